"""TokenServer: windows of tokens by index, for the harvesters. One per stream, stateless to others.

Every window is a function of the config and its index, so a server that was restarted gives the
same windows again. So that it need not make all of them for that, now and then it hands out, with a
block, where in the text the next one begins; whoever asks tells it (`near`).
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from saeray.actors.waiting import NotYet
from saeray.lm.hub import embedding_rows, load_tokenizer
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import SpecialTokens
from saeray.spec.synthetic import is_synthetic
from saeray.stream.check import check_texts
from saeray.text.row_numbers import RowNumbers
from saeray.text.served import Blocks, BlockStart, ServedRows
from saeray.text.tokens import TokenWindows

AT_ONCE_SECONDS = 1.0  # that a call makes windows before it says how far it is
PLACE_EVERY = 64  # blocks


class TokenBlock(NamedTuple):
    """The tokens of a block, and where the next one begins."""

    tokens: np.ndarray  # int32 [n, context_size]
    next_at: BlockStart


class TokenCounts(NamedTuple):
    """How the text has been used up so far."""

    epochs: int  # begun
    skipped_rows: int
    warnings: list[str]


class TokenServer:
    """Opens the dataset at the first call, so that a bad path is an answer and not a dead actor."""

    def __init__(self, config: dict[str, Any], environment: dict[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        self.config = LanguageModelSAERunnerConfig.from_dict(config)
        self.windows: TokenWindows | RowNumbers | None = None
        self.served: ServedRows | None = None  # rows; None: all of them
        self.blocks: Blocks | None = None
        self.warnings: list[str] = []

    def open(self) -> TokenWindows | RowNumbers:
        if self.windows is None and is_synthetic(self.config.model_name):
            self.windows = RowNumbers(self.config)
        if self.windows is None:
            tokenizer = load_tokenizer(self.config)
            self.windows = TokenWindows(
                self.config,
                tokenizer,
                n_embeddings=embedding_rows(self.config),
                warn=self.warnings.append,
            )
        if self.blocks is None:
            self.served = ServedRows.of(self.windows)
            self.blocks = Blocks(self.windows, self.served)
        return self.windows

    def check(self) -> SpecialTokens:
        """The token that begins every window, if any does, and those whose rows are left out.

        Raises:
            ConfigError: the dataset or the tokenizer can't be used, or no rows are left.
        """
        windows = self.open()
        excluded = () if self.served is None else tuple(self.served.excluded.tolist())
        if windows.bos is None:
            return SpecialTokens(None, None, excluded)
        bos = windows.tokenizer.convert_ids_to_tokens(windows.bos)
        return SpecialTokens(windows.bos, bos, excluded)

    def check_others(self, configs: list[dict[str, Any]]) -> None:
        """`check` of streams that others will serve."""
        check_texts([LanguageModelSAERunnerConfig.from_dict(c) for c in configs])

    def block(self, index: int, near: BlockStart | None = None) -> np.ndarray | TokenBlock | NotYet:
        """The windows of LM batch `index`: int32 [n, context_size].

        n is store_batch_size, or as many as it takes where special tokens are left out.

        near: where a block before it begins, if that is known. Answers `NotYet` while the source is
        slow or there is much to be passed over: ask again.
        """
        windows = self.open()
        assert self.blocks is not None
        tokens = self.blocks.within(AT_ONCE_SECONDS, index, near)
        if tokens is None:
            rows = f"{windows.rows.seen:,} rows have come from {self.config.dataset_path}"
            return NotYet(f"the token server ({rows})", progress=windows.progress)
        if (index + 1) % PLACE_EVERY:
            return tokens
        return TokenBlock(tokens, self.blocks.start(index + 1))

    def held_out(self) -> np.ndarray:
        """int32 [eval_windows, context_size]; no training block ever holds a token of them."""
        return self.open().evaluation()

    def counts(self) -> TokenCounts:
        windows = self.open()
        return TokenCounts(windows.epoch + 1, windows.skipped_rows, self.warnings)
