"""A dataset's rows in the order in which they are held out and trained on, over any source.

What can be indexed is permuted as a whole, anew for each epoch. What only streams goes through a
shuffle buffer, bounded in rows and in bytes; its order is a function of the rows and the seed, and
of nothing else: not of how fast they come, nor of the version of `datasets`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import numpy as np

from saeray.errors import SaerayError, bad_value
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.order import permutation
from saeray.text.columns import Columns, Masked, flat_ids
from saeray.text.read_bytes import Counted, count_reads

OpenRows = Callable[[], Iterator[list[Any]]]  # batches of rows, from the first one

ROWS_AT_ONCE = 256  # per tokenizer call
SHUFFLE_ROWS = 10_000  # of the buffer that a stream goes through
SHUFFLE_BYTES = 512 * 2**20  # of it: UTF-8, or 8 bytes a token id
SOURCE_TRIES = 4  # of a source that raises or stalls, each from where the one before stopped
# A try may stall for this share of wait_limit_s, so that all of them take less than those who wait
# for the tokens are ready to wait.
STALL_SHARE = 1 / 6
LOOK_SECONDS = 0.5  # between looks at a source that is slow


class Unreadable(Exception):
    """A file of the source can't be read; says which, and why."""


class Waiting:
    """Stands where a batch would: the source is slow, and whoever asks may do something else."""


WAITING = Waiting()


class Rows:
    """The rows of one dataset: `held_out()`, then `training(epoch)` without those.

    `columns` must be set before; what is in them is told by `first()`.
    """

    columns: Columns

    def __init__(
        self, dataset: Any, config: LanguageModelSAERunnerConfig, warn: Callable[[str], None]
    ) -> None:
        assert config.data_seed is not None
        self.dataset = dataset
        self.config = config
        self.seed = config.data_seed
        self.warn = warn
        self.n_held_out = 0  # rows that no epoch has
        self.seen = 0  # rows that have come from a source that streams, all passes together
        if self.n_rows is None:
            count_reads()

    @property
    def progress(self) -> int:
        """Grows while anything comes from the source."""
        return self.seen + Counted.total

    @property
    def n_rows(self) -> int | None:
        return len(self.dataset) if hasattr(self.dataset, "__len__") else None

    def first(self) -> Iterator[dict[str, Any]]:
        """Rows as they are, with all columns."""
        if self.n_rows is not None:
            yield from (self.dataset[i] for i in range(self.n_rows))
            return

        def one_by_one() -> Iterator[list[Any]]:
            for row in self.dataset:
                self.seen += 1
                yield [row]

        for batch in self.patiently(one_by_one):
            if not isinstance(batch, Waiting):
                yield from batch

    def held_out(self) -> Iterator[list[Any]]:
        """Batches of all rows, in the order of which the first are held out."""
        if self.n_rows is None:
            return batched(self.streamed(self.dataset))
        return self.indexed(self.fixed_order())

    def training(self, epoch: int, first: int = 0) -> Iterator[list[Any]]:
        """Batches of the rows of an epoch, from its row `first` on."""
        if self.n_rows is not None:
            order = self.fixed_order()[self.n_held_out :]
            order = order[permutation(len(order), self.seed, epoch, salt=3)]
            return self.indexed(order[first:])
        seed = (self.seed + epoch) % 2**32
        if self.config.text_version == 1:
            shuffling = self.dataset.skip(self.n_held_out).shuffle(seed, buffer_size=SHUFFLE_ROWS)
            rows = self.streamed(shuffling)
        else:
            rest = itertools.islice(self.streamed(self.dataset), self.n_held_out, None)
            rows = shuffled(rest, seed)
        return batched(itertools.islice(rows, first, None))

    def fixed_order(self) -> np.ndarray:
        """One order of all rows, the same in every epoch: its first rows are held out."""
        assert self.n_rows is not None
        return permutation(self.n_rows, self.seed, 0, salt=2)

    def indexed(self, order: np.ndarray) -> Iterator[list[Any]]:
        table = self.dataset.select_columns(self.columns.names)
        for a in range(0, len(order), ROWS_AT_ONCE):
            batch = table[order[a : a + ROWS_AT_ONCE].tolist()]
            values = zip(*(batch[name] for name in self.columns.names), strict=True)
            yield [self.columns.of_values(*of_row) for of_row in values]

    def streamed(self, dataset: Iterable[dict[str, Any]]) -> Iterator[Any]:
        for row in dataset:
            self.seen += 1
            yield self.columns.of_row(row)

    # --- with patience ----------------------------------------------------------------------

    def patiently(self, open_rows: OpenRows) -> Iterator[list[Any] | Waiting]:
        """The batches of rows, over a source that may raise or stall now and then.

        A source that is slow but gives anything is no stall, however long it takes to a batch.

        Raises:
            SaerayError: it raised or stalled `SOURCE_TRIES` times in a row; says what it last said.
            ConfigError: something is wrong with a file of it.
        """
        passed_on, n_rows, tries = 0, 0, 0
        while True:
            rows = open_rows()
            # Its own thread each time: one that stalls can't be stopped, only left alone.
            reading = ThreadPoolExecutor(1, "dataset")
            try:
                for i in itertools.count():
                    future = reading.submit(next, rows, None)
                    yield from self.until(future)
                    batch = future.result()
                    if batch is None:
                        return
                    if i >= passed_on:
                        passed_on, n_rows, tries = i + 1, n_rows + len(batch), 0
                        yield batch
            except SaerayError:
                raise
            except Exception as error:
                if isinstance(error, Unreadable) and not isinstance(error.__cause__, OSError):
                    raise bad_value(  # what is in a file is the same the next time
                        "dataset_path", self.config.dataset_path, f"can't be read on: {error}."
                    ) from None
                tries += 1
                what = str(error) if isinstance(error, FutureTimeout) else f"{error!r}"
                where = f"{self.config.dataset_path}, after {n_rows:,} rows: {what}"
                if tries == SOURCE_TRIES:
                    raise SaerayError(
                        f"the dataset can't be read on, tried {tries} times ({where}). "
                        "`saeray sweep --resume` goes on when it can."
                    ) from None
                self.warn(f"{where}; tried again.")
                time.sleep(min(2.0**tries, self.stall))
            finally:
                reading.shutdown(wait=False)

    @property
    def stall(self) -> float:
        """Seconds without anything after which a source has stalled."""
        return self.config.wait_limit_s * STALL_SHARE

    def until(self, future: Future[Any]) -> Iterator[Waiting]:
        """Waits for a batch as long as something comes in; lets its caller breathe meanwhile.

        Raises:
            FutureTimeout: none came for too long.
        """
        progress, since = self.progress, time.monotonic()
        while True:
            try:
                future.exception(timeout=min(LOOK_SECONDS, self.stall / 4))
                return
            except FutureTimeout:
                if future.done():
                    return
            now = time.monotonic()
            if self.progress != progress:
                progress, since = self.progress, now
            elif now - since > self.stall:
                raise FutureTimeout(f"nothing came for {self.stall:g} s")
            yield WAITING


def batched(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        yield batch


def shuffled(
    rows: Iterable[Any], seed: int, n_rows: int = SHUFFLE_ROWS, n_bytes: int = SHUFFLE_BYTES
) -> Iterator[Any]:
    """Rows in a seeded order, through a buffer that holds so many rows and bytes at most.

    A full buffer is permuted and gives its first half; the rest of the rows is permuted in the end.
    That is the order of `IterableDataset.shuffle(seed, buffer_size=n_rows)` where it counts rows.
    """
    random = np.random.default_rng(seed)
    held: list[Any] = []
    sizes: list[int] = []
    total = 0
    for row in rows:
        held.append(compact(row))
        sizes.append(bytes_of(held[-1]))
        total += sizes[-1]
        if len(held) < n_rows and total < n_bytes:
            continue
        order = random.permutation(len(held))
        kept = order[len(held) - len(held) // 2 :]
        yield from (restored(held[i]) for i in order[: len(held) - len(kept)])
        held, sizes = [held[i] for i in kept], [sizes[i] for i in kept]
        total = sum(sizes)
    yield from (restored(held[i]) for i in random.permutation(len(held)))


class Utf8(bytes):
    """Text as it is held: Python may take four bytes for each of its characters."""


def compact(row: Any) -> Any:
    """A row in a form of known size: text as UTF-8, token ids as an array of 8 bytes each."""
    if isinstance(row, str):
        return Utf8(row.encode(errors="surrogatepass"))
    if isinstance(row, Masked):
        return Masked(compact(row.ids), compact(row.mask))
    ids = flat_ids(row) if isinstance(row, (list, np.ndarray)) else None
    return row if ids is None else ids.astype(np.int64)


def restored(row: Any) -> Any:
    return row.decode(errors="surrogatepass") if isinstance(row, Utf8) else row


def bytes_of(row: Any) -> int:
    """The size of a compact row; what is neither text nor token ids counts for nothing."""
    if isinstance(row, Masked):
        return bytes_of(row.ids) + bytes_of(row.mask)
    return row.nbytes if isinstance(row, np.ndarray) else len(row) if isinstance(row, Utf8) else 0
