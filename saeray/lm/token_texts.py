"""Tokens as a reader sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SPACE = "▁"  # what sentencepiece writes for one
UNDECODABLE = "\ufffd"


def byte_letters() -> dict[str, int]:
    """What stands for each byte in a byte-level BPE: itself where it is a visible character of
    Latin-1, else the next character from U+0100 on (GPT-2)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_LETTERS = byte_letters()


def token_texts(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """What each token stands for, with its spaces and line breaks.

    Of a token that is a part of a character, its bytes (`\\xe2\\x80`), or the tokenizer's own name
    for it; of one that the tokenizer does not have, its number.
    """
    size = len(tokenizer)
    return {i: token_text(tokenizer, i) if i < size else f"<{i}>" for i in map(int, ids)}


def token_text(tokenizer: Any, token: int) -> str:
    piece = tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if UNDECODABLE in text or (not text and piece):
        return as_bytes(piece)
    # Decoded alone, a word loses the space before it.
    if piece.startswith(SPACE) and not text.startswith(" "):
        text = " " + text
    return str(text)


def as_bytes(piece: str) -> str:
    """The name of a part of a character as bytes, where it is one of a byte-level BPE."""
    if piece.isascii() or not all(letter in BYTE_LETTERS for letter in piece):
        return str(piece)  # as sentencepiece's <0xE2>
    return "".join(f"\\x{BYTE_LETTERS[letter]:02x}" for letter in piece)
