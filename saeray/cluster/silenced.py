"""Says it when an L1 coefficient leaves an SAE nothing to train, as one of another loss does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saeray.spec.coefficients import MeanNorms, silenced_text
from saeray.spec.config import LanguageModelSAERunnerConfig

LEAST_L0 = 1.0  # mean active features per row: with fewer, most rows have none


class Silenced:
    """Of a pack's SAEs, once for each coefficient, loss and hook point."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self.said: set[tuple[object, ...]] = set()

    def look(self, config: LanguageModelSAERunnerConfig, step: int, l0: float, x: Tensor) -> None:
        """x: [rows, d_in], what is reconstructed at this step, as the language model gives it."""
        if config.l1_coefficient is None or config.target_l0 is not None or l0 >= LEAST_L0:
            return
        key = (config.l1_coefficient, config.mse_normalization, config.hooks_read)
        if key in self.said:
            return
        self.said.add(key)
        rows = x.float()
        plain = torch.linalg.vector_norm(rows, dim=1).mean()
        centred = torch.linalg.vector_norm(rows - rows.mean(dim=0), dim=1).mean()
        norms = MeanNorms(len(rows), float(plain), float(centred))
        when = f"L0 is {l0:.2g} at step {step}"
        self.warn(silenced_text(config, x.shape[1], norms, when))
