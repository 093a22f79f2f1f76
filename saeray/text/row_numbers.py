"""Row numbers in the place of token windows, where the model is synthetic: no text, no end.

The first `eval_windows` windows are set aside for evaluation, as those of a text are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.text.tokens import Position


class RowNumbers:
    """What a `TokenWindows` is to its token server."""

    bos = None
    tokenizer: Any = None
    rows: Any = None
    epoch = 0
    skipped_rows = 0
    progress = 0

    def __init__(self, config: LanguageModelSAERunnerConfig) -> None:
        self.config = config

    def numbered(self, first: int, n: int) -> np.ndarray:
        size = self.config.context_size
        return np.arange(first * size, (first + n) * size, dtype=np.int32).reshape(n, size)

    def evaluation(self) -> np.ndarray:
        """int32 [eval_windows, context_size]."""
        return self.numbered(0, self.config.eval_windows)

    def train_within(
        self, seconds: float | None, first: int, n: int, near: Position | None = None
    ) -> np.ndarray:
        """Training windows first … first + n - 1: int32 [n, context_size]."""
        return self.numbered(self.config.eval_windows + first, n)

    def nearest(self, window: int) -> Position:
        return Position(window)
