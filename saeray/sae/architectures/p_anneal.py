"""p-annealing (Karvonen et al., 2408.00113): the L1 becomes an L_p, p falling from 1.

    f = relu(h)        added: c_t · mean_B Σ_j g(f_j),  g(f) = f^p     (times n_j, as the L1 is)

p falls to p_end in p_updates equal steps, spread evenly from p_anneal_start_step on. At each the
coefficient is multiplied by the mean of Σ f^p at the old p over that at the new one, over the last
10 batches, so that the penalty goes on at the strength that it had. Below LINEAR_BELOW g is the
line from 0 to there: a power's slope at 0 is infinite, and one silent feature would be a whole
step's gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.architectures.rule import Active, Pulled, Rule
from saeray.sae.options import TrainingOptions

BATCHES = 10  # over which the penalties of the old and the new p are compared
LINEAR_BELOW = 1e-3  # in f's unit
STEERED_UNTIL = 0.6  # of all steps p falls, where an L0 is to be reached: steering comes after it


class PAnneal(Rule):
    """Trains a `StandardSAE`."""

    EXTRA_STATE = ("p", "multiplier", "done", "old", "new")
    SUMS = ("norm", "power", "next_power")

    def __init__(self, sae: SAE, options: TrainingOptions) -> None:
        super().__init__(sae, options)
        self.p = 1.0
        self.multiplier = 1.0  # of the coefficient
        self.done = 0  # optimizer steps
        self.old: list[float] = []  # Σ f^p of the last batches, at this p
        self.new: list[float] = []  # and at the one that comes next

    @property
    def coefficient(self) -> float:
        return self.options.l1_coefficient * self.multiplier

    @property
    def remedy(self) -> str | None:
        return "ghost_grad" if self.options.use_ghost_grads else None

    @property
    def updates(self) -> list[int]:
        """The steps after which p falls."""
        o = self.options
        end = int(o.total_steps * (STEERED_UNTIL if o.target_l0 else 1.0))
        left = max(o.p_updates, end - o.p_anneal_start_step)
        return [o.p_anneal_start_step + left * i // o.p_updates for i in range(o.p_updates)]

    @property
    def next_p(self) -> float:
        o = self.options
        return max(o.p_end, self.p - (1.0 - o.p_end) / o.p_updates)

    @property
    def compares(self) -> bool:
        """Whether this step's batch is one of those over which penalties are compared."""
        return any(0 <= step - self.done - 1 < BATCHES for step in self.updates)

    def power(self, f: Tensor, p: float) -> Tensor:
        """g(f)."""
        return f.clamp_min(LINEAR_BELOW).pow_(p - 1.0).mul_(f)

    def pull_back(self, active: Active) -> Pulled:
        f = active.f
        slope = f.clamp_min(LINEAR_BELOW).pow_(self.p - 1.0)
        slope = torch.where(f >= LINEAR_BELOW, self.p * slope, slope)
        dh = self.weighted(slope * self.step.per_row, active.at).add_(active.df).mul_(f > 0)
        sums = {}
        if self.step.norms is not None:
            sums["norm"] = self.power(f, self.p) * self.step.per_row
        if self.compares:
            sums["power"] = self.weighted(self.power(f, self.p), active.at)
            sums["next_power"] = self.weighted(self.power(f, self.next_p), active.at)
        return Pulled(dh, sums)

    def sparsity(self, active: Active) -> Tensor:
        return self.weighted(self.power(active.f, self.p), active.at).sum()

    def finish_gradient(self, grad: Any) -> None:
        super().finish_gradient(grad)
        if self.compares:
            self.old.append(float(grad.extra["power"].double().sum()))
            self.new.append(float(grad.extra["next_power"].double().sum()))

    def after_step(self) -> None:
        self.done += 1
        if self.done in self.updates:
            if sum(self.new) > 0:
                self.multiplier *= sum(self.old) / sum(self.new)
            self.p, self.old, self.new = self.next_p, [], []
