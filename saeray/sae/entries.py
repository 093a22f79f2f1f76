"""The active entries of a batch: where they are kept, and how they are selected.

Pre-activations h live in the cache, a block of rows at a time; which of them are active is written
down and the rest forgotten. With compute_dtype bfloat16 the product finds which are, and the values
of those are computed again in full precision.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.gradients import block_rows

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


class Entries:
    """The active entries of one lane, row after row, and the block that they are found in.

    Of row r they are offsets[r] to offsets[r + 1]; each has its feature, ascending in a row, its
    value, h at first and then f, and dh.
    """

    def __init__(self, sae: SAE, n_rows: int, bfloat16: bool) -> None:
        narrow = torch.bfloat16 if bfloat16 else sae.W_enc.dtype
        self.rows = block_rows(sae, narrow.itemsize)
        self.bits = BITS[narrow]
        infinity = torch.tensor([-math.inf], dtype=narrow)
        self.floor = infinity.view(self.bits).numpy()[0]
        self.h = torch.empty(
            min(self.rows, n_rows), sae.d_sae, dtype=torch.bfloat16 if bfloat16 else sae.W_enc.dtype
        )
        self.dtype = sae.W_enc.detach().numpy().dtype
        self.exact = narrow == sae.W_enc.dtype
        self.offsets = np.zeros(n_rows + 1, np.int64)
        self.feature = np.empty(0, np.int32)
        self.value = self.dh = np.empty(0, self.dtype)
        self.resize(sae.d_sae + 64 * n_rows)

    def resize(self, room: int) -> None:
        kept = len(self.feature)
        self.feature = np.concatenate((self.feature, np.empty(room - kept, np.int32)))
        self.value = np.concatenate((self.value, np.empty(room - kept, self.dtype)))
        self.dh = np.empty(room, self.dtype)

    def __len__(self) -> int:
        return int(self.offsets[-1])


class Selection:
    """Which entries of a batch are active, for one SAE and one step: the same in all its lanes."""

    def __init__(
        self,
        sae: SAE,
        x_factor: Tensor,
        W_enc: Tensor,
        x_centred: Tensor,
        *,
        floor: Tensor | None = None,
        k: int | None = None,
        by: Tensor | None = None,
    ) -> None:
        """x_factor [B, D], W_enc [D, L]: as the product takes them; x_centred [B, D] exact.

        floor [L]: h above it is active, above 0 where there is none; k: and only each row's k
        largest, h times `by` [L].
        """
        self.x, self.W_enc, self.k = x_factor, W_enc, k
        b_enc = sae.b_enc if floor is None else sae.b_enc - floor
        self.bias = b_enc.to(x_factor.dtype)
        self.floor = None if floor is None else floor.detach().numpy()
        self.floors = np.zeros(sae.d_sae, x_centred.numpy().dtype) if floor is None else self.floor
        self.by = None if by is None else by.to(x_factor.dtype)
        self.x_centred = x_centred.numpy()
        self.weights = sae.W_enc.t().detach().numpy()
        self.biases = sae.b_enc.detach().numpy()

    def find(self, rows: slice, entries: Entries) -> None:
        """A lane's active entries, with h for their values."""
        from saeray.sae import numba_kernels as kernels

        self.look(self.x[rows], entries)
        if not entries.exact:
            kernels.exact_values(
                entries.offsets, entries.feature, entries.value,
                self.x_centred[rows], self.weights, self.biases, self.floors,
            )  # fmt: skip
        elif self.floor is not None:
            n = len(entries)
            entries.value[:n] += self.floor[entries.feature[:n]]
        elif self.k is not None and self.by is not None:
            n = len(entries)
            entries.value[:n] /= self.by.numpy()[entries.feature[:n]]

    def look(self, x: Tensor, entries: Entries) -> None:
        """A block of pre-activations at a time."""
        from saeray.sae import numba_kernels as kernels

        n = 0
        for first in range(0, len(x), entries.rows):
            some = x[first : first + entries.rows]
            h = entries.h[: len(some)]
            torch.addmm(self.bias, some, self.W_enc, out=h)
            if self.k is not None and self.by is not None:
                h.mul_(self.by)
            bits = h.view(entries.bits).numpy()
            done = 0
            while True:
                where = (entries.floor, first + done, entries.offsets, entries.feature, n)
                if self.k is None:
                    more, n = kernels.select_active(bits[done:], *where)
                else:
                    more, n = kernels.select_largest(bits[done:], self.k, *where)
                done += more
                if done == len(some):
                    break
                entries.resize(2 * len(entries.feature) + h.shape[1])
            if entries.exact:
                kernels.take_values(
                    h.numpy(), first, len(some), entries.offsets, entries.feature, entries.value
                )


def keep_at_least(entries: Entries, smallest: float, by: Tensor | None) -> None:
    """Drops entries whose value, times `by` [L], is below the smallest that is active."""
    n = len(entries)
    feature, value = entries.feature[:n], entries.value[:n]
    ranked = value if by is None else value * by.numpy()[feature]
    kept = ~(ranked < smallest)  # what is not a number stays, and is seen
    before = np.concatenate(([0], np.cumsum(kept)))
    entries.offsets[:] = before[entries.offsets]
    n_left = int(before[-1])
    feature[:n_left], value[:n_left] = feature[kept], value[kept]
