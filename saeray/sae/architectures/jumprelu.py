"""JumpReLU (Rajamanoharan et al., 2407.14435): a threshold for every feature, learned.

    f = h · 1[h > θ]       added, by jumprelu_sparsity_loss_mode, with c = l0_coefficient:
  step       c · mean_B Σ_j 1[h_j > θ_j]                           DeepMind
  tanh       c · mean_B Σ_j tanh(s f_j n_j)                        Anthropic, January 2025
  quadratic  c · mean_B (2 / L0*) (Σ_j 1[h_j > θ_j] - L0*)²        Gemma Scope 2; L0* is target_l0

The jump has no slope, so θ learns from the entries within half a bandwidth b of it. With g the
gradient that comes in and r = 1[|h - θ| < b / 2]:

    of f:          ∂θ = -Σ_B (θ / b) r g       ∂h = 1[h > θ] g
    of 1[h > θ]:   ∂θ = -Σ_B (1 / b) r g       ∂h = 0

and with jumprelu_ste_to_input each -∂θ reaches h too. θ is kept at 0 or above, and as the weights
are (float32 or wider): a parameter that Adam moves by lr a step must not be rounded to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.architectures.rule import Active, Pulled, Rule
from saeray.sae.options import TrainingOptions

SPARSITY_LOSS_MODES = ("step", "tanh", "quadratic")


class JumpReLUSAE(SAE):
    """Weights and forward pass; also of what batchtopk and matryoshka publish, θ one constant."""

    architecture = "jumprelu"
    EXTRA = ("threshold",)

    threshold: Tensor

    def latents(self, h: Tensor) -> Tensor:
        return torch.relu(h) * (h > self.threshold)


class JumpReLU(Rule):
    """Trains a `JumpReLUSAE`."""

    SUMS = ("threshold", "norm")
    sparsity_loss = "l0_loss"
    has_thresholds = True

    def __init__(self, sae: SAE, options: TrainingOptions) -> None:
        super().__init__(sae, options)
        self.target = options.target_l0  # of the penalty

    @classmethod
    def starts(cls, name: str, options: TrainingOptions) -> float:
        return options.jumprelu_init_threshold

    @property
    def coefficient(self) -> float:
        return self.options.l0_coefficient

    sae: JumpReLUSAE

    @property
    def threshold(self) -> Tensor:
        return self.sae.threshold

    @property
    def remedy(self) -> str | None:
        return "pre_act" if self.options.pre_act_loss_coefficient > 0 else None

    def floor(self) -> Tensor:
        return self.threshold - self.options.jumprelu_bandwidth / 2

    def latents(self, h: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        return h * (h > at(self.threshold))

    def pull_back(self, active: Active) -> Pulled:
        h, at, o = active.h, active.at, self.options
        theta = at(self.threshold)
        gate = (h > theta).to(h.dtype)
        band = ((h - theta).abs() < o.jumprelu_bandwidth / 2).to(h.dtype) / o.jumprelu_bandwidth
        df, sums = active.df, {}
        by_gate: Tensor | float = 0.0  # gradient by 1[h > θ]
        if o.jumprelu_sparsity_loss_mode == "tanh":
            fall = 1 - self.tanh(active).square()  # at f = 0 as well: the jump comes from there
            slope = fall * (o.jumprelu_tanh_scale * self.step.per_row)
            if self.step.norms is not None:
                sums["norm"] = slope * active.f
            df = df + self.weighted(slope, at)
        elif o.jumprelu_sparsity_loss_mode == "step":
            by_gate = self.step.per_row
        else:
            off = active.of_row(active.row_l0() - self.target)
            by_gate = off * (4 * self.step.per_row / o.target_l0)
        to_threshold = band * (theta * df + by_gate)
        dh = gate * df
        if o.jumprelu_ste_to_input:
            dh = dh + to_threshold
        return Pulled(dh, {"threshold": -to_threshold, **sums})

    def tanh(self, active: Active) -> Tensor:
        f = self.weighted(active.f, active.at)
        return torch.tanh(self.options.jumprelu_tanh_scale * f)

    def sparsity(self, active: Active) -> Tensor:
        mode, target = self.options.jumprelu_sparsity_loss_mode, self.options.target_l0
        if mode == "tanh":
            return self.tanh(active).sum()
        if mode == "step":
            return (active.f != 0).sum().to(active.f.dtype)
        return (2 / target) * (active.row_l0() - self.target).square().sum()

    def after_step(self) -> None:
        self.threshold.clamp_min_(0)

    def aim(self, multiplier: float) -> None:
        self.target = self.options.target_l0 / multiplier

    def steer(self, by: float) -> None:
        self.threshold.mul_(math.exp(by))
