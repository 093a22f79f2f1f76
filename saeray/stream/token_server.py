"""TokenServer: windows of tokens by index, for the harvesters. One per stream, stateless to others.

Every window is a function of the config and its index, so a server that was restarted gives the
same windows again.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

from saeray.lm.hub import embedding_rows, load_tokenizer
from saeray.lm.tokens import TokenWindows
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import Bos


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
        self.windows: TokenWindows | None = None
        self.warnings: list[str] = []

    def open(self) -> TokenWindows:
        if self.windows is None:
            tokenizer = load_tokenizer(self.config)
            self.windows = TokenWindows(
                self.config,
                tokenizer,
                n_embeddings=embedding_rows(self.config),
                warn=self.warnings.append,
            )
        return self.windows

    def check(self) -> Bos | None:
        """The token that begins every window, if any does.

        Raises:
            ConfigError: the dataset or the tokenizer can't be used.
        """
        windows = self.open()
        if windows.bos is None:
            return None
        return Bos(windows.bos, windows.tokenizer.convert_ids_to_tokens(windows.bos))

    def block(self, index: int) -> np.ndarray:
        """The windows of LM batch `index`: int32 [store_batch_size, context_size]."""
        n = self.config.store_batch_size
        return self.open().train(index * n, n)

    def held_out(self) -> np.ndarray:
        """int32 [eval_windows, context_size]; no training block ever holds a token of them."""
        return self.open().evaluation()

    def counts(self) -> TokenCounts:
        windows = self.open()
        return TokenCounts(windows.epoch + 1, windows.skipped_rows, self.warnings)
