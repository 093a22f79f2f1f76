"""The standard SAE: one hidden layer, ReLU, untied weights, an L1 on the features.

    f = relu(h)        added to the squared error: l1_coefficient · mean_B Σ_j f_j

A feature counts with the norm of its decoder row where those are free: scaling f down and the row
up would lower the penalty for nothing. (Cunningham et al., Bricken et al. 2023.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE, folded
from saeray.sae.architectures.rule import Active, Rule, StepContext


class StandardSAE(SAE):
    """Weights and forward pass of anything whose latents are relu(h)."""

    architecture = "standard"

    def latents(self, h: Tensor) -> Tensor:
        return torch.relu(h)


def with_unit_rows(sae: SAE) -> SAE:
    """Decoder rows of norm 1, where that makes the same function: latents that are relu(h)."""
    return sae.with_tensors(folded(sae)) if isinstance(sae, StandardSAE) else sae


class Standard(Rule):
    """Its steps are taken in the shortest way of all: everything is told by `penalty`."""

    keeps_h = False
    constant: float | Tensor = 0.0  # `penalty` of this step

    @property
    def remedy(self) -> str | None:
        return "ghost_grad" if self.options.use_ghost_grads else None

    def begin_step(self, step: StepContext) -> None:
        super().begin_step(step)
        self.constant = step.per_row if step.norms is None else step.norms * step.per_row

    @property
    def penalty(self) -> float | Tensor:
        return self.constant

    def losses(self, sparsity: float, remedy: float) -> dict[str, float]:
        return {"losses/l1_loss": sparsity, "losses/ghost_grad_loss": remedy}

    def latents_of_block(self, h: Tensor, f: Tensor) -> None:
        f.clamp_min_(0)  # h lies there: it is not kept

    def pull_back_block(self, active: Active, extra: dict[str, Tensor]) -> None:
        active.df.add_(self.penalty)
        torch.ops.aten.threshold_backward.grad_input(active.df, active.f, 0, grad_input=active.df)

    def finish_gradient(self, grad: Any) -> None:
        if self.step.norms is not None:
            grad.add_weighted_l1_(self.sae.W_dec, self.step.norms, self.step.per_row)
