"""Text to token windows, each with an index under which it can be had again.

Documents (texts, or rows that are tokenised already) are laid end to end and cut into windows of
context_size tokens. With `prepend_bos` every window begins with the BOS token and documents are
separated by one, as the language model saw them in training.

The documents that fill the first `eval_windows` windows are set aside for evaluation and stay out
of every epoch, so no SAE ever trains on them; where they are all there is, the end of the last one
is, and its beginning is trained on. The rest is shuffled anew for each epoch by seed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from saeray.errors import ConfigError, bad_value
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.text.columns import choose_columns
from saeray.text.dataset import open_conversion, open_dataset
from saeray.text.documents import Documents
from saeray.text.hub_dataset import LoadingScript
from saeray.text.rows import WAITING, Rows, Waiting
from saeray.text.vocabulary import Vocabulary
from saeray.text.window_store import WindowStore

logger = logging.getLogger(__name__)

MOST_MAKERS = 2  # readings of the text at a time: one for those ahead, one for who is far behind


class Position(NamedTuple):
    """Where in the text a window begins: windows from there on need nothing before it."""

    window: int = 0
    epoch: int = 0
    row: int = 0  # of the epoch's order
    at: int = 0  # token of that row's document
    skipped_rows: int = 0  # so far


class Length(NamedTuple):
    """Of the text of an epoch."""

    documents: int
    tokens: float


class TokenWindows:
    """All windows of one stream: `train(i, n)` and `evaluation()`.

    Windows that were made are kept, as many as fit into a bounded file; one that is not there is
    made (again) from the nearest place before it that is known.
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
            ConfigError: see `open_dataset` and `choose_columns`; also an empty dataset, one too
                small for eval_windows, or a tokenizer without BOS where prepend_bos wants one.
        """
        self.config = config
        self.warn = warn
        self.tokenizer = tokenizer
        vocabulary = Vocabulary(config, tokenizer, n_embeddings, warn)
        self.bos = vocabulary.bos
        try:
            self.dataset = open_dataset(config)
        except LoadingScript as script:
            self.dataset, instead = open_conversion(config)
            warn(f"{config.dataset_path}: {script}; {instead}.")
        self.rows = Rows(self.dataset, config, warn)
        columns = choose_columns(config, self.column_names(), self.rows.first())
        self.column, self.is_tokenized = columns.value, columns.is_tokenized
        self.rows.columns = columns
        self.documents = Documents(self.rows, vocabulary)
        self.epoch = 0  # completed passes over the training documents
        self.skipped_rows = 0  # empty or odd ones, over all epochs
        self.train_tokens: int | None = None  # of the one document there is, if it is cut
        self.held_out = self.make_held_out()
        self.store = WindowStore(config.context_size, folder)
        self.start = Position(skipped_rows=self.skipped_rows)
        self.known = {0: self.start}  # by the store's segment: of a window in it
        self.makers: list[WindowMaker] = []  # the one used last comes last
        self.n_made = 0  # windows, those that were made again included

    @property
    def context_size(self) -> int:
        return self.config.context_size

    @property
    def n_held_out_documents(self) -> int:
        return self.rows.n_held_out

    def column_names(self) -> list[str]:
        names = self.dataset.column_names
        if names is None:  # a stream that only knows its columns once it is read
            names = next(self.rows.first(), {})
        if not names:
            raise bad_value("dataset_path", self.config.dataset_path, "the dataset is empty.")
        return list(names)

    def evaluation(self) -> np.ndarray:
        """The held-out windows: int32 [eval_windows, context_size]."""
        return self.held_out

    def train(self, first: int, n: int) -> np.ndarray:
        """Training windows first … first + n - 1: int32 [n, context_size]."""
        windows = self.train_within(None, first, n)
        assert windows is not None
        return windows

    def train_within(
        self, seconds: float | None, first: int, n: int, near: Position | None = None
    ) -> np.ndarray | None:
        """`train`, or None when that takes longer; what was made till then is not lost.

        near: a position that an earlier `TokenWindows` of the same config has told.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        windows = []
        for window in range(first, first + n):
            while not self.store.has(window):
                maker = self.maker_for(window, near or self.start)
                try:
                    maker.make_one()
                except Exception:
                    self.makers.remove(maker)  # whoever asks again begins anew
                    raise
                if deadline is not None and time.monotonic() > deadline:
                    return None
            windows.append(self.store.read(window))
        return np.stack(windows)

    # --- where to make them from ------------------------------------------------------------

    def maker_for(self, window: int, near: Position) -> WindowMaker:
        """A reading of the text that comes to a window soon."""
        if self.makers and self.makers[-1].position.window == window:
            return self.makers[-1]
        nearest = self.nearest(window)
        if nearest.window < near.window <= window:
            nearest = near
        running = [m for m in self.makers if m.position.window <= window]
        maker = max(running, key=lambda m: m.position.window, default=None)
        # A source that streams is read from its first row, wherever one wants to begin.
        jumps = self.rows.n_rows is not None
        if maker is None or (jumps and nearest.window > maker.position.window):
            maker = WindowMaker(self, nearest)
            if len(self.makers) == MOST_MAKERS:
                self.makers.pop(0).close()
        else:
            self.makers.remove(maker)
        self.makers.append(maker)
        return maker

    @property
    def progress(self) -> int:
        """Grows while there is any."""
        return self.rows.progress + self.n_made

    def nearest(self, window: int) -> Position:
        """The last known position that is not behind a window."""
        if self.makers and self.makers[-1].position.window == window:
            return self.makers[-1].position
        for segment in range(window // self.store.per_segment, -1, -1):
            position = self.known.get(segment)
            if position is not None and position.window <= window:
                return position
        raise AssertionError("the first window's position is always known")

    def made(self, ids: np.ndarray, window: int, next_one: Position) -> None:
        """Takes what a `WindowMaker` has made."""
        self.store.add(window, ids)
        self.n_made += 1
        self.known.setdefault(next_one.window // self.store.per_segment, next_one)
        self.skipped_rows = max(self.skipped_rows, next_one.skipped_rows)
        self.epoch = max(self.epoch, next_one.epoch)

    def passed(self, epoch: int, n_documents: int) -> None:
        """An epoch has been read to its end, for the first time or again."""
        if epoch < self.epoch:
            return
        self.epoch = epoch + 1
        self.warn(
            f"{self.config.dataset_path}: all {n_documents:,} documents have been read; epoch "
            f"{self.epoch + 1} begins."
        )

    def length(self, at_most: int) -> Length:
        """Of an epoch's text, by at most so many of its documents where it has more.

        For a dataset that knows how many rows it has.
        """
        assert self.rows.n_rows is not None
        if self.train_tokens is not None:
            return Length(1, float(self.train_tokens))
        counts: list[int] = []
        documents = self.documents.of(partial(self.rows.training, 0, 0))
        for ids in documents:
            if not isinstance(ids, Waiting):
                counts.append(len(ids) + (self.bos is not None))
            if len(counts) == at_most:
                break
        documents.close()  # type: ignore[attr-defined]
        n = self.rows.n_rows - self.rows.n_held_out
        return Length(n, n * sum(counts) / max(1, len(counts)))

    # --- from documents to windows ----------------------------------------------------------

    def make_held_out(self) -> np.ndarray:
        n_rows, n_skipped = 0, 0
        held: list[np.ndarray] = []
        cut = Cut()
        documents = self.documents.of(self.rows.held_out)

        def counted() -> Iterator[np.ndarray]:
            nonlocal n_rows, n_skipped
            for ids in documents:
                if isinstance(ids, Waiting):
                    continue
                n_rows += 1
                if len(ids):
                    held.append(ids)
                    yield ids
                else:
                    n_skipped += 1

        windows: list[Any] = []
        for window in self.pack(counted(), cut):
            windows.append(window)
            if len(windows) == self.config.eval_windows:
                break
        if not held:
            raise self.nothing_held()
        more = any(not isinstance(ids, Waiting) and len(ids) for ids in documents)
        if not more:  # nothing with text is left: the last document's beginning must do
            left = len(held[-1]) - cut.at
            if len(windows) < self.config.eval_windows or left == 0:
                raise bad_value(
                    "eval_windows",
                    self.config.eval_windows,
                    f"setting aside that many windows of {self.context_size} tokens takes all of "
                    f"{self.config.dataset_path} and leaves nothing to train on; a larger dataset "
                    "or fewer windows.",
                )
            if cut.at:  # else it has only given a BOS
                windows = list(self.pack(iter([*held[:-1], held[-1][left:]])))
            self.train_tokens = left
            n_rows -= 1
        self.rows.n_held_out = n_rows
        self.skipped_rows = n_skipped
        return np.stack(windows)

    def nothing_held(self) -> ConfigError:
        odd = self.documents.odd
        what = "the dataset is empty." if odd is None else f"no row gives any token ({odd})."
        return bad_value("dataset_path", self.config.dataset_path, what)

    def pack(
        self, documents: Iterator[np.ndarray | Waiting], cut: Cut | None = None
    ) -> Iterator[np.ndarray | Waiting]:
        """Lays documents end to end and cuts: int32 [context_size] at a time."""
        size, bos = self.context_size, self.bos
        window = np.empty(size, dtype=np.int32)
        filled = 0
        cut = cut or Cut()
        for ids in documents:
            if isinstance(ids, Waiting):
                yield WAITING
                continue
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
                    cut.at = at
                    yield window.copy()
                    filled = 0


class Cut:
    """Where the last window ended in its last document."""

    at = 0


class WindowMaker:
    """One reading of the training text: windows without end, epoch after epoch, from a position."""

    def __init__(self, windows: TokenWindows, position: Position) -> None:
        self.windows = windows
        self.position = position  # of the window that is made next
        self.cut = Cut()
        self.epoch, self.row = position.epoch, position.row
        self.skipped_rows = position.skipped_rows
        self.in_hand = 0  # tokens of the document that was laid last
        self.offset = position.at  # of the first token of it
        self.packed = windows.pack(self.documents(), self.cut)

    def make_one(self) -> None:
        """The next window; or none yet, when the source is slow."""
        ids = next(self.packed)
        if isinstance(ids, Waiting):
            return
        left = self.in_hand - self.cut.at
        row, at = (self.row, 0) if left == 0 else (self.row - 1, self.offset + self.cut.at)
        made = self.position.window
        self.position = Position(made + 1, self.epoch, row, at, self.skipped_rows)
        self.windows.made(ids, made, self.position)

    def documents(self) -> Iterator[np.ndarray | Waiting]:
        """Documents without end, from the position on."""
        windows, skip = self.windows, self.offset
        while True:
            began, n_documents = self.row, 0
            opened = partial(windows.rows.training, self.epoch, began)
            for ids in windows.documents.of(opened, began):
                if isinstance(ids, Waiting):
                    yield WAITING
                    continue
                self.row += 1
                if len(ids) == 0:
                    self.skipped_rows += 1
                    continue
                n_documents += 1
                self.offset, skip = skip, 0
                ids = ids[self.offset : windows.train_tokens]
                self.in_hand = len(ids)
                yield ids
            if began == n_documents == 0:
                raise ConfigError(
                    f"dataset_path = {windows.config.dataset_path!r}: no document with text is "
                    f"left to train on ({self.skipped_rows} rows were empty)."
                )
            windows.passed(self.epoch, self.row)
            self.epoch, self.row = self.epoch + 1, 0

    def close(self) -> None:
        """Leaves the source alone."""
        self.packed.close()  # type: ignore[attr-defined]
