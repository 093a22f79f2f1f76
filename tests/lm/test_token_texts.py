"""Tokens as a reader sees them."""

import pytest
from support.bundled import fields

from saeray.lm.hub import load_tokenizer
from saeray.lm.token_texts import BYTE_LETTERS, as_bytes, token_text, token_texts
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve(LanguageModelSAERunnerConfig(**fields())))


def test_words_keep_their_spaces_and_line_breaks(tokenizer):
    ids = tokenizer("def  f(x):\n    return x")["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert "".join(texts[i] for i in ids) == "def  f(x):\n    return x"


def test_parts_of_a_character_are_bytes(tokenizer):
    ids = tokenizer("—")["input_ids"]  # e2 80 94
    texts = [token_text(tokenizer, i) for i in ids]
    assert "".join(texts) in ("\\xe2\\x80\\x94", "—")
    assert as_bytes("âĢ") == "\\xe2\\x80"
    assert as_bytes("<0xE2>") == "<0xE2>"
    assert sorted(BYTE_LETTERS.values()) == list(range(256))


def test_what_the_tokenizer_does_not_have_is_its_number(tokenizer):
    assert token_texts(tokenizer, [0, 10**6]) == {0: "<|endoftext|>", 10**6: "<1000000>"}


class Sentencepiece:
    """Decodes a word alone without the space before it, as sentencepiece does."""

    pieces = ("▁cat", "s", "<0xE2>")

    def __len__(self):
        return 3

    def convert_ids_to_tokens(self, i):
        return self.pieces[i]

    def decode(self, ids, **_):
        return ("cat", "s", "\ufffd")[ids[0]]


def test_sentencepiece_words_get_their_space_back():
    assert token_texts(Sentencepiece(), range(3)) == {0: " cat", 1: "s", 2: "<0xE2>"}
