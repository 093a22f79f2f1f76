"""Rows to documents: the token ids of each, checked, unmasked, without a BOS of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from saeray.errors import ConfigError
from saeray.text.columns import Masked, described, flat_ids, is_empty
from saeray.text.rows import WAITING, OpenRows, Rows, Waiting
from saeray.text.vocabulary import Vocabulary

NO_IDS = np.empty(0, dtype=np.int32)  # of a row that has no text


class Documents:
    """Turns rows into token ids, by the model's tokenizer where they are text."""

    def __init__(self, rows: Rows, vocabulary: Vocabulary) -> None:
        self.rows = rows
        self.vocabulary = vocabulary
        self.odd: str | None = None  # what the first row holds that gives no tokens, nor is empty

    def of(self, open_rows: OpenRows, first: int = 0) -> Iterator[np.ndarray | Waiting]:
        """Token ids of each row, int32 [n]; none of it where a row has no text.

        first: number of the first row, for messages.
        """
        at = first
        for batch in self.rows.patiently(open_rows):
            if isinstance(batch, Waiting):
                yield WAITING
                continue
            for row, ids in zip(batch, self.tokenised(batch, at), strict=True):
                if self.vocabulary.bos is not None and len(ids) and ids[0] == self.vocabulary.bos:
                    ids = ids[1:]
                if len(ids) == 0:
                    self.note_odd(row, at)
                elif not self.vocabulary.has_embeddings(ids):
                    ids = NO_IDS
                at += 1
                yield ids

    def tokenised(self, batch: list[Any], at: int) -> list[np.ndarray]:
        if self.rows.columns.is_tokenized:
            return [self.checked_ids(row, at + i) for i, row in enumerate(batch)]
        encoded = self.vocabulary.tokenizer(
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
        ids = None if is_empty(value) else flat_ids(value)
        if ids is not None and mask is not None:
            shown = flat_mask(mask)
            ids = None if shown is None or len(shown) != len(ids) else ids[shown]
        if ids is None or ids.size == 0:
            return NO_IDS
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary.size:
            bad = int(ids.max()) if int(ids.max()) >= self.vocabulary.size else int(ids.min())
            raise ConfigError(
                f"dataset_path = {self.rows.config.dataset_path!r}: row {at} of column "
                f"{self.rows.columns.value!r} holds token id {bad}, but "
                f"{self.rows.config.model_name} has a vocabulary of {self.vocabulary.size}; the "
                "text was tokenised for another model."
            )
        return ids.astype(np.int32)

    def note_odd(self, row: Any, at: int) -> None:
        """Keeps what the first row holds that gives no tokens, if it is not just empty."""
        if self.odd is not None:
            return
        value, mask = (row.ids, row.mask) if isinstance(row, Masked) else (row, None)
        if not is_empty(value):
            beside = "" if mask is None else f" beside an attention_mask of {described(mask)}"
            column = self.rows.columns.value
            self.odd = f"row {at} of column {column!r} holds {described(value)}{beside}"


def flat_mask(mask: Any) -> np.ndarray | None:
    """Which of a row's token ids count, bool [n]; None: it is no mask."""
    try:
        flat = flat_ids(np.asarray(mask, dtype=np.int32))
    except (ValueError, TypeError):
        return None
    return None if flat is None else flat != 0
