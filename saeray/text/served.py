"""Which rows of token windows SAEs see, and which windows that makes a block of the stream.

Where special tokens are left out (`exclude_special_tokens`), windows differ in how many of their
rows are served, and a block has a fixed number of rows: it takes whole windows until there are that
many, and leaves the rest of the last one's rows out. The next block begins with the next window. So
every window is computed once, and where a block begins is a function of the text before it.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from saeray.errors import ConfigError, bad_value, nearest
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.stream import positions, row_values
from saeray.text.row_numbers import RowNumbers
from saeray.text.tokens import Position, TokenWindows

# What `exclude_special_tokens: true` stands for: the ids that sae_lens leaves out by that name.
# Those of a chat template, which tokenizers call special too, are text to an SAE.
STRUCTURAL = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
)
MOST_CONTEXTS = 100  # that a block takes for each of store_batch_size; then the text is no good


def excluded_ids(config: LanguageModelSAERunnerConfig, tokenizer: Any) -> tuple[int, ...]:
    """The token ids whose rows are never served, ascending.

    Raises:
        ConfigError: an id or a name that the tokenizer does not have, or it has no special tokens.
    """
    wanted = config.exclude_special_tokens
    if not wanted:
        return ()
    if isinstance(wanted, tuple):
        return tuple(sorted({id_of(token, config, tokenizer) for token in wanted}))
    ids = [getattr(tokenizer, name, None) for name in STRUCTURAL]
    found = {int(i) for i in ids if i is not None}
    if not found:
        raise bad_value(
            "exclude_special_tokens",
            True,
            f"the tokenizer of {config.model_name} has no BOS, EOS, PAD or SEP; give token ids or "
            "names, or leave it out.",
        )
    return tuple(sorted(found))


def id_of(token: int | str, config: LanguageModelSAERunnerConfig, tokenizer: Any) -> int:
    if isinstance(token, int):
        if token >= len(tokenizer):
            raise bad_value(
                "exclude_special_tokens",
                token,
                f"{config.model_name} has a vocabulary of {len(tokenizer)}, ids from 0.",
            )
        return token
    found = tokenizer.convert_tokens_to_ids(token)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if found is None or (found == unknown and token != getattr(tokenizer, "unk_token", None)):
        raise bad_value(
            "exclude_special_tokens",
            token,
            f"{config.model_name} has no such token; "
            + nearest(token, list(getattr(tokenizer, "all_special_tokens", []))),
        )
    return int(found)


class ServedRows:
    """Of a config that leaves rows out: which of them are left."""

    def __init__(self, config: LanguageModelSAERunnerConfig, excluded: tuple[int, ...]) -> None:
        """excluded: token ids, see `excluded_ids`."""
        self.config = config
        self.positions = positions(config)
        self.excluded = np.array(excluded, dtype=np.int32)

    @classmethod
    def of(cls, windows: TokenWindows | RowNumbers) -> ServedRows | None:
        """Of the windows of a text; None where all rows are served.

        Raises:
            ConfigError: see `excluded_ids`; or no row of the held-out windows is served.
        """
        config = windows.config
        if not row_values(config):
            return None
        served = cls(config, excluded_ids(config, windows.tokenizer))
        if not served.mask(windows.evaluation()).any():
            raise ConfigError(
                f"{served.named()}: all {windows.evaluation().size:,} rows of the held-out windows "
                "are left out."
            )
        return served

    def named(self) -> str:
        """The fields and their values, for messages."""
        values = row_values(self.config)
        return ", ".join(
            f"{name} = {list(v) if isinstance(v, tuple) else v!r}" for name, v in values.items()
        )

    def mask(self, windows: np.ndarray) -> np.ndarray:
        """Of token windows int [n, context] the rows that are served: bool [n, context]."""
        served = np.zeros(windows.shape, dtype=bool)
        at = slice(self.positions.start, self.positions.stop)
        served[:, at] = ~np.isin(windows[:, at], self.excluded)
        return served

    def of_block(self, windows: np.ndarray) -> np.ndarray:
        """Which of the n * context rows of a block's windows are its own: int64 [block_rows]."""
        rows = np.flatnonzero(self.mask(windows))[: self.config.block_rows]
        assert len(rows) == self.config.block_rows
        return rows


class BlockStart(NamedTuple):
    """Where a block begins."""

    block: int
    window: int  # its first
    near: Position  # in the text, of that window or one before it


class Blocks:
    """The windows of each block: int32 [n, context_size]."""

    def __init__(self, windows: TokenWindows | RowNumbers, served: ServedRows | None) -> None:
        """served: None where all rows of a window are."""
        self.windows = windows
        self.contexts = windows.config.store_batch_size
        self.rows = windows.config.block_rows
        # Where it has to be counted how many windows a block takes.
        self.counted = served if served is not None and len(served.excluded) else None
        self.starts = {0: 0}  # first windows, by block

    def within(
        self, seconds: float, block: int, near: BlockStart | None = None
    ) -> np.ndarray | None:
        """A block's windows, or None when that takes longer; what was made is not lost.

        near: a block's start that an earlier `Blocks` of the same config has told.

        Raises:
            ConfigError: hardly a row of the text is served.
        """
        position = None if near is None else near.near
        if self.counted is None:
            first = block * self.contexts
            return self.windows.train_within(seconds, first, self.contexts, position)
        deadline = time.monotonic() + seconds
        if near is not None and near.block <= block:
            self.starts[near.block] = near.window
        at = block if block in self.starts else max(b for b in self.starts if b < block)
        while True:
            tokens = self.made(deadline, self.starts[at], position)
            if tokens is None:
                return None
            self.starts[at + 1] = self.starts[at] + len(tokens)
            if at == block:
                return tokens
            at += 1

    def made(self, deadline: float, first: int, position: Position | None) -> np.ndarray | None:
        """The windows of the block that begins with window `first`; None: not in time."""
        assert self.counted is not None
        most = self.contexts * MOST_CONTEXTS
        parts: list[np.ndarray] = []
        n, have = 0, 0
        while have < self.rows:
            if n >= most:
                raise ConfigError(
                    f"{self.counted.named()}: of {n * self.windows.config.context_size:,} tokens "
                    f"of {self.windows.config.dataset_path}, from window {first:,} on, only "
                    f"{have:,} rows are left; less than a hundredth is too little."
                )
            more = min(-(-(self.rows - have) // len(self.counted.positions)), most - n)
            left = max(0.0, deadline - time.monotonic())
            part = self.windows.train_within(left, first + n, more, position)
            if part is None:
                return None
            parts.append(part)
            n, have = n + more, have + int(self.counted.mask(part).sum())
        return np.concatenate(parts)

    def start(self, block: int) -> BlockStart:
        """Where a block begins whose predecessor was served."""
        window = block * self.contexts if self.counted is None else self.starts[block]
        return BlockStart(block, window, self.windows.nearest(window))
