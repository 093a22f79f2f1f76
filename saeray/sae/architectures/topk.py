"""TopK (Gao et al., 2406.04093): the k largest pre-activations of a row, and no sparsity term.

    f = relu(h) where h is among its row's k largest, else 0        added: AuxK for the dead

Where decoder rows are free, h counts with its row's norm when the largest are chosen: norms drift,
and without it a feature could gain by writing loudly. Published with the norms folded in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE, folded
from saeray.sae.architectures.rule import Active, Pulled, Rule


class TopKSAE(SAE):
    """Weights and forward pass."""

    architecture = "topk"
    SETTINGS = ("k",)
    SAE_LENS_CFG: ClassVar[dict[str, Any]] = {
        "rescale_acts_by_decoder_norm": False
    }  # norms are folded in

    k: int

    def __init__(self, *weights: Tensor, k: float, **named: Any) -> None:
        super().__init__(*weights, k=int(k), **named)

    def latents(self, h: Tensor) -> Tensor:
        values, features = torch.relu(h).topk(min(self.k, h.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(h).scatter_(-1, features, values)


class Selecting(Rule):
    """What `TopK` and `BatchTopK` share: selected pre-activations pass as they are."""

    always_sparse = True
    sparsity_loss = None
    is_steered = False
    keeps_h = False

    @property
    def coefficient(self) -> float:
        return 0.0

    @property
    def remedy(self) -> str | None:
        return "auxk" if self.options.auxk_coefficient > 0 else None

    def selected_by(self) -> Tensor | None:
        return self.step.norms

    def latents(self, h: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
        return h

    def pull_back(self, active: Active) -> Pulled:
        return Pulled(active.df, {})

    def pull_back_block(self, active: Active, extra: dict[str, Tensor]) -> None:
        active.df.mul_(active.f > 0)

    def sparsity(self, active: Active) -> Tensor:
        return active.f.new_zeros(())


class TopK(Selecting):
    """Trains a `TopKSAE`."""

    @property
    def k(self) -> int | None:
        return int(self.options.k)

    def latents_of_block(self, h: Tensor, f: Tensor) -> None:
        f.clamp_min_(0)  # h lies there: it is not kept
        by = self.selected_by()
        ranked = f if by is None else f * by
        _, features = ranked.topk(min(int(self.options.k), f.shape[1]), dim=1, sorted=False)
        values = f.gather(1, features)
        f.zero_().scatter_(1, features, values)

    def published(self) -> SAE:
        unit = self.options.decoder_norm == "unit"
        return self.sae if unit else self.sae.with_tensors(folded(self.sae))
