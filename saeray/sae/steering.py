"""Steering towards an L0: the sparsity coefficient follows what the batches show.

With l a running mean of log L0 over batches and l' its trend, what counts is where L0 is heading:

    e = l + AHEAD · l' · steps - log target

The coefficient's logarithm moves by g · e + r a step, and r itself by DRIFT · g² · e: at one
coefficient L0 falls slowly for as long as an SAE learns, and a controller without r would stay
behind it. g is GAIN over all steps, so that a longer training is steered more gently. Steering
begins when the coefficient's warm-up is over and ends FROZEN before the training does, so that the
SAE settles at one coefficient.

With thresholds (jumprelu, whose penalty has a target itself) two things are moved instead. They
follow their penalty by Adam alone, lr a step: of 240 steps at 1e-3 that is 0.24, where L0 10 of 512
features took a θ of 8. So while L0 is off by more than SLACK all of them are multiplied, to the
end, since that acts at once. And the squared error pulls them down, to an L0 above the target; so
near it the penalty's own target is divided by the multiplier. (By factors alone the θ of features
that seldom fire, and so learn nothing, rose until these were dead; a larger coefficient made all
rows alike.)

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
SLACK = 0.03  # of log(L0 / target), within which thresholds are left to their penalty
FASTEST = 1.0  # of e, as far as it counts
MEAN_RATE = 0.2  # of the running mean
TREND_RATE = 40.0  # of the trend's, over all steps
LEAST_L0 = 1e-3
KEPT = ("log_multiplier", "drift", "log_l0", "trend")  # in checkpoints
FROZEN = 0.05  # of all steps, at the end


class Steering:
    """What the sparsity coefficient of one SAE is multiplied by, or its target divided."""

    def __init__(self, options: TrainingOptions, thresholds: bool = False) -> None:
        """thresholds: there are some, that can be moved themselves."""
        self.thresholds = thresholds
        self.target = options.target_l0
        self.first = options.l1_warm_up_steps
        self.last = options.total_steps - max(1, int(FROZEN * options.total_steps))
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

        The logarithm of what thresholds are to be multiplied by, where there are any.
        """
        now = math.log(max(l0, LEAST_L0))
        if self.log_l0 is None:
            self.log_l0 = now
        else:
            moved = MEAN_RATE * (now - self.log_l0)
            self.log_l0 += moved
            self.trend += self.trend_rate * (moved - self.trend)
        if step < self.first:
            return 0.0
        off = self.log_l0 - math.log(self.target)
        e = max(-FASTEST, min(FASTEST, off + self.ahead * self.trend))
        near = abs(off) < NEAR
        if step < self.last and (near or not self.thresholds):
            if near:
                self.drift += DRIFT * self.gain**2 * e
            self.log_multiplier += self.gain * e + self.drift
        if not self.thresholds or abs(off) < SLACK:
            return 0.0
        return self.gain * e + self.drift

    def state(self) -> dict[str, Any]:
        """Plain numbers that a checkpoint holds."""
        return {name: getattr(self, name) for name in KEPT}

    def restore(self, numbers: dict[str, Any]) -> None:
        for name in KEPT:
            setattr(self, name, numbers.get(name, getattr(self, name)))
