"""Steering towards an L0: the sparsity coefficient follows what the batches show.

With l a running mean of log L0 over batches and l' its trend, what counts is where L0 is heading:

    e = l + AHEAD · l' · steps - log target

The coefficient's logarithm moves by g · e + r a step, and r itself by DRIFT · g² · e: at one
coefficient L0 falls slowly for as long as an SAE learns, and a controller without r would stay
behind it. g is GAIN over all steps, so that a longer training is steered more gently. Steering
begins when the coefficient's warm-up is over and ends FROZEN before the training does, so that the
SAE settles at one coefficient.

jumprelu's quadratic penalty has a target of its own, but θ follows it by Adam alone, lr a step: of
240 steps at 1e-3 only 0.24, where L0 10 of 512 took a θ of 8. There the thresholds are steered
instead, all by the same factor and to the end, since they act at once.

All of it is a function of counts, which are whole numbers, and is kept in checkpoints: a resumed
run is the uninterrupted one, and packing changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

from saeray.sae.options import TrainingOptions

GAIN = 16.0  # over all steps
MOST_GAIN = 0.06  # a step: what an SAE answers with comes some steps later
DRIFT = 0.8
AHEAD = 0.05  # of all steps
NEAR = 0.5  # of log(L0 / target): only there the drift is learned
FASTEST = 1.0  # of e, as far as it counts
MEAN_RATE = 0.2  # of the running mean
TREND_RATE = 40.0  # of the trend's, over all steps
LEAST_L0 = 1e-3
KEPT = ("log_multiplier", "drift", "log_l0", "trend")  # in checkpoints
FROZEN = 0.05  # of all steps, at the end


class Steering:
    """What the sparsity coefficient of one SAE is multiplied by."""

    def __init__(self, options: TrainingOptions, to_the_end: bool = False) -> None:
        """to_the_end: what is steered acts at once, so nothing has to settle."""
        self.target = options.target_l0
        self.first = options.l1_warm_up_steps
        self.last = options.total_steps
        if not to_the_end:
            self.last -= max(1, int(FROZEN * options.total_steps))
        self.gain = min(GAIN / options.total_steps, MOST_GAIN)
        self.ahead = AHEAD * options.total_steps
        self.trend_rate = min(1.0, TREND_RATE / options.total_steps)
        self.log_multiplier = 0.0
        self.drift = 0.0
        self.log_l0: float | None = None  # a running mean
        self.trend = 0.0  # of that, a step

    @property
    def multiplier(self) -> float:
        return math.exp(self.log_multiplier)

    def see(self, step: int, l0: float) -> float:
        """After a step: how many features were active in a row of its batch.

        By how much the multiplier's logarithm has changed.
        """
        now = math.log(max(l0, LEAST_L0))
        if self.log_l0 is None:
            self.log_l0 = now
        else:
            change = MEAN_RATE * (now - self.log_l0)
            self.log_l0 += change
            self.trend += self.trend_rate * (change - self.trend)
        if not self.first <= step < self.last:
            return 0.0
        off = self.log_l0 - math.log(self.target)
        e = max(-FASTEST, min(FASTEST, off + self.ahead * self.trend))
        if abs(off) < NEAR:
            self.drift += DRIFT * self.gain**2 * e
        moved = self.gain * e + self.drift
        self.log_multiplier += moved
        return moved

    def state(self) -> dict[str, Any]:
        """Plain numbers that a checkpoint holds."""
        return {name: getattr(self, name) for name in KEPT}

    def restore(self, numbers: dict[str, Any]) -> None:
        for name in KEPT:
            setattr(self, name, numbers.get(name, getattr(self, name)))
