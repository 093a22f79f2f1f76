"""Gated (Rajamanoharan et al., 2404.16014): whether a feature is active, and how much, apart.

    π = (x - b_dec) W_enc + b_gate              f = 1[π > 0] · relu(m)
    m = (x - b_dec) (W_enc · exp(r_mag)) + b_mag

    added:  l1_coefficient · mean_B Σ_j relu(π_j)      (times n_j where the decoder is free)
            mean_B Σ_D (relu(π) W_dec + b_dec - x)²    the auxiliary reconstruction

In the paper, where decoder rows have norm 1, W_dec and b_dec are constants in the last term
(gated_aux_decoder: constant). sae_lens's learn from it, too (live), and where rows are free they
must: the weighted L1 shrinks rows, and if nothing holds against that the gate grows instead, until
nearly all features are active. With unit rows a live decoder is worse.

h of the step is π, and b_enc is b_gate: m = (π - b_gate) exp(r_mag) + b_mag.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.architectures.rule import Active, Pulled, Rule


class GatedSAE(SAE):
    """Weights and forward pass."""

    architecture = "gated"
    EXTRA = ("r_mag", "b_mag")

    r_mag: Tensor
    b_mag: Tensor

    @property
    def b_gate(self) -> Tensor:
        return self.b_enc

    def latents(self, h: Tensor) -> Tensor:
        return torch.relu((h - self.b_enc) * self.r_mag.exp() + self.b_mag) * (h > 0)

    def sae_lens_tensors(self) -> dict[str, Tensor]:
        tensors = super().sae_lens_tensors()
        return {("b_gate" if n == "b_enc" else n): t for n, t in tensors.items()}

    def moved_centre(self, moved: Tensor) -> dict[str, Tensor]:
        return {"b_mag": self.b_mag - moved * self.r_mag.exp()}

    @classmethod
    def from_sae_lens(cls, tensors: dict[str, Tensor], cfg: dict[str, Any]) -> SAE:
        named = {("b_enc" if n == "b_gate" else n): t for n, t in tensors.items()}
        return super().from_sae_lens(named, cfg)


class Gated(Rule):
    """Trains a `GatedSAE`."""

    SUMS = ("r_mag", "b_mag", "norm")
    has_gate = True

    sae: GatedSAE

    @property
    def gate_teaches_decoder(self) -> bool:  # type: ignore[override]
        return self.options.gated_aux_decoder == "live"

    def latents(self, h: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        sae = self.sae
        return torch.relu((h - at(sae.b_enc)) * at(sae.r_mag.exp()) + at(sae.b_mag)) * (h > 0)

    def gate_latents(self, h: Tensor) -> Tensor:
        return torch.relu(h)

    def pull_back(self, active: Active) -> Pulled:
        assert active.df_gate is not None
        h, at = active.h, active.at
        gain = at(self.sae.r_mag.exp())
        by_magnitude = active.df * (active.f > 0)
        to_product = by_magnitude * gain  # of (x - b_dec) W_enc
        by_gate = (self.weighted(torch.full_like(h, self.step.per_row), at) + active.df_gate) * (
            h > 0
        )
        sums = {"b_mag": by_magnitude, "r_mag": to_product * (h - at(self.sae.b_enc))}
        if self.step.norms is not None:
            sums["norm"] = torch.relu(h) * self.step.per_row
        return Pulled(to_product + by_gate, sums)

    def sparsity(self, active: Active) -> Tensor:
        return self.weighted(torch.relu(active.h), active.at).sum()

    def finish_gradient(self, grad: Any) -> None:
        super().finish_gradient(grad)
        # b_gate moves π alone: what reaches the product by way of m passes it by.
        grad.b_enc.sub_(grad.extra["b_mag"] * self.sae.r_mag.exp())
