"""Tokens as a reader sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SPACE = "▁"  # what sentencepiece writes for one
UNDECODABLE = "\ufffd"


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """What each token stands for, with its spaces and line breaks.

    Of a token that is a part of a character, the tokenizer's own name for it; of one that the
    tokenizer does not have, its number.
    """
    size = len(tokenizer)
    return {i: token_text(tokenizer, i) if i < size else f"<{i}>" for i in map(int, ids)}


def token_text(tokenizer: Any, token: int) -> str:
    piece = tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if UNDECODABLE in text or (not text and piece):
        return str(piece)
    # Decoded alone, a word loses the space before it.
    if piece.startswith(SPACE) and not text.startswith(" "):
        text = " " + text
    return str(text)
