"""Rows to documents: the token ids of each, checked, unmasked, without a BOS of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from saeray.errors import ConfigError
from saeray.lm.columns import Masked, described, flat_ids, is_empty
from saeray.lm.rows import WAITING, OpenRows, Rows, Waiting

NO_IDS = np.empty(0, dtype=np.int32)  # of a row that has no text


class Documents:
    """Turns rows into token ids, by the model's tokenizer where they are text."""

    def __init__(self, rows: Rows, tokenizer: Any, bos: int | None) -> None:
        self.rows = rows
        self.tokenizer = tokenizer
        self.d_vocab = len(tokenizer)
        self.bos = bos
        self.odd: str | None = None  # what the first row holds that is neither text nor empty

    def of(self, open_rows: OpenRows, first: int = 0) -> Iterator[np.ndarray | Waiting]:
        """Token ids of each row, int32 [n]; none of it where a row has no text.

        first: number of the first row, for messages.
        """
        at = first
        for batch in self.rows.patiently(open_rows):
            if isinstance(batch, Waiting):
                yield WAITING
                continue
            for ids in self.tokenised(batch, at):
                at += 1
                yield ids[1:] if self.bos is not None and len(ids) and ids[0] == self.bos else ids

    def tokenised(self, batch: list[Any], at: int) -> list[np.ndarray]:
        if self.rows.columns.is_tokenized:
            return [self.checked_ids(row, at + i) for i, row in enumerate(batch)]
        for i, row in enumerate(batch):
            if not isinstance(row, str) and not is_empty(row):
                self.note_odd(row, at + i)
        encoded = self.tokenizer(
            [row if isinstance(row, str) else "" for row in batch],
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def checked_ids(self, row: Any, at: int) -> np.ndarray:
        """The ids of a row that is tokenised already.

        Raises:
            ConfigError: one of them is not in the vocabulary.
        """
        value, mask = (row.ids, row.mask) if isinstance(row, Masked) else (row, None)
        if is_empty(value):
            return NO_IDS
        ids = flat_ids(value)
        if ids is None:
            self.note_odd(value, at)
            return NO_IDS
        if mask is not None:
            shown = flat_ids(np.asarray(mask).astype(np.int32))
            if shown is None or len(shown) != len(ids):
                self.note_odd(value, at, f" beside an attention_mask of {described(mask)}")
                return NO_IDS
            ids = ids[shown != 0]
        if ids.size == 0:
            return NO_IDS
        if int(ids.min()) < 0 or int(ids.max()) >= self.d_vocab:
            bad = int(ids.max()) if int(ids.max()) >= self.d_vocab else int(ids.min())
            raise ConfigError(
                f"dataset_path = {self.rows.config.dataset_path!r}: row {at} of column "
                f"{self.rows.columns.value!r} holds token id {bad}, but "
                f"{self.rows.config.model_name} has a vocabulary of {self.d_vocab}; the text was "
                "tokenised for another model."
            )
        return ids.astype(np.int32)

    def note_odd(self, value: Any, at: int, more: str = "") -> None:
        if self.odd is None:
            self.odd = (
                f"row {at} of column {self.rows.columns.value!r} holds {described(value)}{more}"
            )
