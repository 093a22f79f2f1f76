"""Matryoshka (Bussmann et al., 2503.17547): BatchTopK whose first features must do alone.

    added to the squared error of all L features: Σ_w mean_B Σ_D (f[:w] W_dec[:w] + b_dec - x)²

for each of matryoshka_widths below L, with weight 1. So the first features are general, and later
ones add detail instead of splitting them. The batch's k·B largest are chosen over all of them, and
AuxK works on the whole.
"""

from __future__ import annotations

from saeray.sae.architectures.batchtopk import BatchTopK


class Matryoshka(BatchTopK):
    """Trains the weights of a `StandardSAE`; what it publishes is a `JumpReLUSAE`."""

    @property
    def widths(self) -> tuple[int, ...]:
        return self.options.matryoshka_widths
