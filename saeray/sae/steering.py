"""Steering towards an L0: the sparsity coefficient follows what the batches show.

With e = log(L0 / target), L0 a running mean over batches, the coefficient's logarithm moves by
g · e + r a step, where r itself moves by DRIFT g² · e: at one coefficient L0 falls slowly for as
long as an SAE learns, and a controller without r would stay behind it. g is GAIN over all steps, so
that a longer training is steered more gently. Steering begins when the coefficient's warm-up is
over and ends FROZEN before the training does, so that the SAE settles at one coefficient.

All of it is a function of counts, which are whole numbers, and is kept in checkpoints: a resumed
run is the uninterrupted one, and packing changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

from saeray.sae.options import TrainingOptions

GAIN = 16.0  # over all steps
MOST_GAIN = 0.06  # a step: what an SAE answers with comes some steps later
DRIFT = 0.2
NEAR = 0.5  # of log(L0 / target): only there the drift is learned
FASTEST = 1.0  # of log(L0 / target), as far as it counts
MEAN_RATE = 0.2  # of the running mean
FROZEN = 0.05  # of all steps, at the end


class Steering:
    """What the sparsity coefficient of one SAE is multiplied by."""

    def __init__(self, options: TrainingOptions) -> None:
        self.target = options.target_l0
        self.first = options.l1_warm_up_steps
        self.last = options.total_steps - max(1, int(FROZEN * options.total_steps))
        self.gain = min(GAIN / options.total_steps, MOST_GAIN)
        self.log_multiplier = 0.0
        self.drift = 0.0
        self.l0: float | None = None  # a running mean

    @property
    def multiplier(self) -> float:
        return math.exp(self.log_multiplier)

    def see(self, step: int, l0: float) -> None:
        """After a step: how many features were active in a row of its batch."""
        self.l0 = l0 if self.l0 is None else self.l0 + MEAN_RATE * (l0 - self.l0)
        if not self.first <= step < self.last:
            return
        off = math.log(max(self.l0, 1e-3) / self.target)
        off = max(-FASTEST, min(FASTEST, off))
        if abs(off) < NEAR:
            self.drift += DRIFT * self.gain**2 * off
        self.log_multiplier += self.gain * off + self.drift

    def state(self) -> dict[str, Any]:
        """Plain numbers that a checkpoint holds."""
        return {"log_multiplier": self.log_multiplier, "drift": self.drift, "l0": self.l0}

    def restore(self, numbers: dict[str, Any]) -> None:
        self.log_multiplier, self.drift = numbers["log_multiplier"], numbers["drift"]
        self.l0 = numbers["l0"]
