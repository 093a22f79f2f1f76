"""BatchTopK (Bussmann et al., 2412.06410): the k·B largest pre-activations of a whole batch.

    f = relu(h) where h is among the batch's k·B largest, else 0        added: AuxK for the dead

So rows share what they need. Those that equal the smallest of them are all in, and nothing depends
on an order. Used without a batch it is a JumpReLU: f = h · 1[h > θ], θ the running mean (rate
topk_threshold_rate, in double precision) of the batches' smallest active value. Early on, when that
moves fast, the mean is of fewer: the rate is EARLY over the batches so far where that is more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE, folded
from saeray.sae.architectures.jumprelu import JumpReLUSAE
from saeray.sae.architectures.topk import Selecting
from saeray.sae.options import TrainingOptions

EARLY = 10.0


class BatchTopK(Selecting):
    """Trains the weights of a `StandardSAE`; what it publishes is a `JumpReLUSAE`."""

    EXTRA_STATE = ("threshold", "smallest", "n_seen")

    def __init__(self, sae: SAE, options: TrainingOptions) -> None:
        super().__init__(sae, options)
        self.n_seen = 0  # batches in the mean
        self.threshold: float | None = None  # θ, in the unit of h times its row's norm

    def n_of_batch(self, n_rows: int) -> int:
        """How many are active in a batch of so many rows."""
        return max(1, min(round(self.options.k * n_rows), n_rows * self.sae.d_sae))

    def latents_of_block(self, h: Tensor, f: Tensor) -> None:
        by = self.selected_by()
        f.mul_((f if by is None else f * by) >= self.smallest).clamp_min_(0)

    def after_step(self) -> None:
        if self.smallest == math.inf:  # nothing was active
            return
        self.n_seen += 1
        rate = min(1.0, max(self.options.topk_threshold_rate, EARLY / self.n_seen))
        before = self.smallest if self.threshold is None else self.threshold
        self.threshold = (1 - rate) * before + rate * self.smallest

    def published(self) -> SAE:
        unit = self.options.decoder_norm == "unit"
        tensors = self.sae.tensors if unit else folded(self.sae)
        threshold = torch.full_like(self.sae.b_enc, self.threshold or 0.0)
        return JumpReLUSAE(**tensors, threshold=threshold)
