"""Text to token windows, each with an index under which it can be had again.

Documents (texts, or rows that are tokenised already) are laid end to end and cut into windows of
context_size tokens. With `prepend_bos` every window begins with the BOS token and documents are
separated by one, as the language model saw them in training.

The documents that fill the first `eval_windows` windows are set aside for evaluation and stay out
of every epoch, so no SAE ever trains on them. The rest is shuffled anew for each epoch by seed.
"""

from __future__ import annotations

import itertools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from functools import partial
from typing import Any

import numpy as np

from saeray.errors import ConfigError, SaerayError, bad_value
from saeray.lm.dataset import choose_column, open_dataset
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.order import permutation

logger = logging.getLogger(__name__)

OpenRows = Callable[[], Iterator[list[Any]]]  # batches of rows, from the first one

DOCUMENTS_AT_ONCE = 256  # per tokenizer call
STREAM_SHUFFLE_BUFFER = 10_000  # documents, for datasets that can't be indexed
SOURCE_TRIES = 4  # of a source that raises or stalls, each from where the one before stopped
# A try may stall for this share of wait_limit_s, so that all of them take less than those who wait
# for the tokens are ready to wait.
STALL_SHARE = 1 / 6


class TokenWindows:
    """All windows of one stream: `train(i, n)` and `evaluation()`.

    Windows already made lie in a file (int32, context_size tokens each, one after the other), so
    any of them can be read again; a window not made yet is made with all before it.
    """

    def __init__(
        self,
        config: LanguageModelSAERunnerConfig,
        tokenizer: Any,
        *,
        n_embeddings: int | None = None,
        folder: str | None = None,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        """Opens the dataset and makes the held-out windows.

        n_embeddings: token ids from here on have no embedding in the model; None: all have.

        Raises:
            ConfigError: see `open_dataset` and `choose_column`; also an empty dataset, one too
                small for eval_windows, or a tokenizer without BOS where prepend_bos wants one.
        """
        self.config = config
        self.warn = warn
        self.tokenizer = tokenizer
        self.d_vocab = len(tokenizer)
        self.n_embeddings = n_embeddings
        self.without_embedding: set[int] = set()  # token ids seen, each warned of once
        self.bos = self.begins_windows() if config.prepend_bos else None
        self.dataset = open_dataset(config)
        columns = self.column_names()
        self.column, self.is_tokenized = choose_column(config, columns)
        self.epoch = 0  # completed passes over the training documents
        self.rows_read = 0  # in the present epoch
        self.skipped_rows = 0  # empty or odd ones, over all epochs
        self.n_held_out_documents = 0
        self.held_out = self.make_held_out()
        # Without a name, so that it goes with its process however that ends.
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (lives as long as the object)
        self.n_made = 0
        self.producer = self.training_windows()

    def begins_windows(self) -> int:
        """The id of BOS, or of what stands in for it where the tokenizer has none."""
        name, bos = self.config.model_name, self.tokenizer.bos_token_id
        if bos is None:
            bos = self.tokenizer.eos_token_id
            if bos is None:
                raise bad_value("prepend_bos", True, f"{name} has no BOS token; set it to false.")
            self.warn(
                f"{name} has no BOS token; its EOS token {self.named(bos)} begins every window in "
                "its place (prepend_bos: false for none)."
            )
        if self.n_embeddings is not None and bos >= self.n_embeddings:
            raise bad_value(
                "prepend_bos",
                True,
                f"the tokenizer's {self.named(bos)} has no embedding in {name}, which has "
                f"{self.n_embeddings}; set it to false.",
            )
        return int(bos)

    def named(self, token_id: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(int(token_id))!r} (id {token_id})"

    def has_embeddings(self, ids: np.ndarray) -> bool:
        """Whether the model has one for every token of a document; warns of tokens it has not."""
        if self.n_embeddings is None or ids.max() < self.n_embeddings:
            return True
        for token_id in sorted({*ids[ids >= self.n_embeddings].tolist()} - self.without_embedding):
            self.without_embedding.add(token_id)
            self.warn(
                f"{self.config.dataset_path}: documents with {self.named(token_id)} are skipped; "
                f"{self.config.model_name} has embeddings for {self.n_embeddings} tokens only."
            )
        return False

    @property
    def context_size(self) -> int:
        return self.config.context_size

    def column_names(self) -> list[str]:
        names = self.dataset.column_names
        if names is None:  # a stream that only knows its columns once it is read
            first = next(iter(self.dataset), None)
            names = list(first) if first is not None else []
        if not names:
            raise bad_value("dataset_path", self.config.dataset_path, "the dataset is empty.")
        return list(names)

    def evaluation(self) -> np.ndarray:
        """The held-out windows: int32 [eval_windows, context_size]."""
        return self.held_out

    def train(self, first: int, n: int) -> np.ndarray:
        """Training windows first … first + n - 1: int32 [n, context_size]."""
        self.make_up_to(first + n)
        size = self.context_size * 4
        data = os.pread(self.file.fileno(), n * size, first * size)
        return np.frombuffer(data, dtype=np.int32).reshape(n, self.context_size)

    def make_up_to(self, n: int) -> None:
        if n <= self.n_made:
            return
        try:
            while self.n_made < n:
                self.file.write(next(self.producer).tobytes())
                self.n_made += 1
        finally:
            self.file.flush()

    # --- from documents to windows ----------------------------------------------------------

    def make_held_out(self) -> np.ndarray:
        windows = []
        for window in self.pack(self.documents(self.held_out_rows)):
            windows.append(window)
            if len(windows) == self.config.eval_windows:
                break
        if self.rows_read == self.skipped_rows:
            raise bad_value("dataset_path", self.config.dataset_path, "the dataset is empty.")
        total = self.n_documents()
        if len(windows) < self.config.eval_windows or (
            total is not None and self.rows_read >= total
        ):
            raise bad_value(
                "eval_windows",
                self.config.eval_windows,
                f"setting aside that many windows of {self.context_size} tokens takes all of "
                f"{self.config.dataset_path} and leaves nothing to train on; a larger dataset or "
                "fewer windows.",
            )
        self.n_held_out_documents = self.rows_read
        return np.stack(windows)

    def training_windows(self) -> Iterator[np.ndarray]:
        """Windows without end: epoch after epoch, each in another order."""

        def documents() -> Iterator[np.ndarray]:
            while True:
                n = 0
                for ids in self.documents(partial(self.training_rows, self.epoch)):
                    n += 1
                    yield ids
                if n == 0:
                    raise ConfigError(
                        f"dataset_path = {self.config.dataset_path!r}: no document with text is "
                        f"left to train on ({self.skipped_rows} rows were empty)."
                    )
                self.epoch += 1
                self.warn(
                    f"{self.config.dataset_path}: all {n:,} documents have been read; epoch "
                    f"{self.epoch + 1} begins."
                )

        return self.pack(documents())

    def pack(self, documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Lays documents end to end and cuts: int32 [context_size] at a time."""
        size, bos = self.context_size, self.bos
        window = np.empty(size, dtype=np.int32)
        filled = 0
        for ids in documents:
            at = 0
            while at < len(ids):
                # BOS begins a window, and stands before a document inside one.
                if bos is not None and (filled == 0 or at == 0):
                    window[filled] = bos
                    filled += 1
                n = min(size - filled, len(ids) - at)
                window[filled : filled + n] = ids[at : at + n]
                filled, at = filled + n, at + n
                if filled == size:
                    yield window.copy()
                    filled = 0

    # --- from rows to documents -------------------------------------------------------------

    def documents(self, open_rows: OpenRows) -> Iterator[np.ndarray]:
        """Token ids of each row that has any, without a BOS of their own."""
        self.rows_read = 0
        for batch in self.patiently(open_rows):
            tokenised = self.tokenise(batch)
            for ids in tokenised:
                self.rows_read += 1
                if ids is None or len(ids) == 0 or not self.has_embeddings(ids):
                    self.skipped_rows += 1
                    continue
                if self.bos is not None and ids[0] == self.bos:
                    ids = ids[1:]
                if len(ids):
                    yield ids

    def tokenise(self, batch: list[Any]) -> list[np.ndarray | None]:
        if self.is_tokenized:
            return [self.checked_ids(row) for row in batch]
        texts = [row if isinstance(row, str) else "" for row in batch]
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            return_attention_mask=False,
            verbose=False,
        )
        return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def checked_ids(self, row: Any) -> np.ndarray | None:
        if row is None:
            return None
        ids = np.asarray(row)
        if ids.size == 0:
            return None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            return None  # odd row: counted with the empty ones
        if int(ids.min()) < 0 or int(ids.max()) >= self.d_vocab:
            bad = int(ids.max()) if int(ids.max()) >= self.d_vocab else int(ids.min())
            raise ConfigError(
                f"dataset_path = {self.config.dataset_path!r}: row {self.rows_read} of column "
                f"{self.column!r} holds token id {bad}, but {self.config.model_name} has a "
                f"vocabulary of {self.d_vocab}; the text was tokenised for another model."
            )
        return ids.astype(np.int32)

    def patiently(self, open_rows: OpenRows) -> Iterator[list[Any]]:
        """The batches of rows, over a source that may raise or stall now and then.

        Raises:
            SaerayError: it did so `SOURCE_TRIES` times in a row; says what it last said.
        """
        passed_on, tries = 0, 0
        stall = self.config.wait_limit_s * STALL_SHARE
        while True:
            rows = open_rows()
            # Its own thread each time: one that stalls can't be stopped, only left alone.
            reading = ThreadPoolExecutor(1, "dataset")
            try:
                for i in itertools.count():
                    batch = reading.submit(next, rows, None).result(timeout=stall)
                    if batch is None:
                        return
                    if i >= passed_on:
                        passed_on, tries = i + 1, 0
                        yield batch
            except SaerayError:
                raise
            except Exception as error:
                tries += 1
                stalled = isinstance(error, (TimeoutError, FutureTimeout))
                what = f"nothing came for {stall:g} s" if stalled else f"{error!r}"
                where = f"{self.config.dataset_path}, after {self.rows_read:,} rows: {what}"
                if tries == SOURCE_TRIES:
                    raise SaerayError(
                        f"the dataset can't be read on, tried {tries} times ({where}). "
                        "`saeray sweep --resume` goes on when it can."
                    ) from None
                self.warn(f"{where}; tried again.")
                time.sleep(min(2.0**tries, stall))
            finally:
                reading.shutdown(wait=False)

    # --- rows in their order ----------------------------------------------------------------

    def n_documents(self) -> int | None:
        return len(self.dataset) if hasattr(self.dataset, "__len__") else None

    def held_out_rows(self) -> Iterator[list[Any]]:
        if self.n_documents() is None:
            yield from self.stream_rows(self.dataset)
        else:
            yield from self.indexed_rows(self.fixed_order())

    def training_rows(self, epoch: int) -> Iterator[list[Any]]:
        assert self.config.data_seed is not None
        if self.n_documents() is None:
            rest = self.dataset.skip(self.n_held_out_documents)
            seed = (self.config.data_seed + epoch) % 2**32
            yield from self.stream_rows(rest.shuffle(seed, buffer_size=STREAM_SHUFFLE_BUFFER))
        else:
            rest = self.fixed_order()[self.n_held_out_documents :]
            order = permutation(len(rest), self.config.data_seed, epoch, salt=3)
            yield from self.indexed_rows(rest[order])

    def fixed_order(self) -> np.ndarray:
        """One order of all rows, the same in every epoch: its first rows are held out."""
        n = self.n_documents()
        assert n is not None and self.config.data_seed is not None
        return permutation(n, self.config.data_seed, 0, salt=2)

    def indexed_rows(self, order: np.ndarray) -> Iterator[list[Any]]:
        column = self.dataset.select_columns([self.column])
        for a in range(0, len(order), DOCUMENTS_AT_ONCE):
            yield column[order[a : a + DOCUMENTS_AT_ONCE].tolist()][self.column]

    def stream_rows(self, dataset: Any) -> Iterator[list[Any]]:
        batch: list[Any] = []
        for row in dataset:
            batch.append(row.get(self.column))
            if len(batch) == DOCUMENTS_AT_ONCE:
                yield batch
                batch = []
        if batch:
            yield batch
