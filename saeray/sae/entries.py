"""The active entries of a batch: where they are kept, and how they are selected.

Products of rows and features live in the cache, a block of rows at a time; who might be active is
written down and the rest forgotten. Their pre-activations are then computed in full precision, and
those that are active stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.gradients import LANE_ROWS, Lane
from saeray.sae.screening import Screen

LEAST_TILE_ROWS = 128


class Entries:
    """The active entries of one lane, row after row, and the block that they are found in.

    Of row r they are offsets[r] to offsets[r + 1]; each has its feature, ascending in a row, its
    value, h at first and then f, and dh.
    """

    def __init__(self, sae: SAE, n_rows: int, screen: Screen) -> None:
        self.product = torch.empty(
            min(screen.block_rows, n_rows), sae.d_sae, dtype=screen.product_dtype
        )
        self.offsets = np.zeros(n_rows + 1, np.int64)
        self.feature = np.empty(0, np.int32)
        self.value = self.dh = np.empty(0, sae.W_enc.detach().numpy().dtype)
        self.resize(sae.d_sae + 64 * n_rows)

    def resize(self, room: int) -> None:
        kept = len(self.feature)
        self.feature = np.concatenate((self.feature, np.empty(room - kept, np.int32)))
        self.value = np.concatenate((self.value, np.empty(room - kept, self.value.dtype)))
        self.dh = np.empty(room, self.value.dtype)

    def __len__(self) -> int:
        return int(self.offsets[-1])


class Selection:
    """Which entries of a batch are active, for one SAE and one step: the same in all its lanes."""

    def __init__(
        self,
        sae: SAE,
        screen: Screen,
        x_centred: Tensor,
        *,
        floor: Tensor | None = None,
        k: int | None = None,
        by: Tensor | None = None,
    ) -> None:
        """screen: set for this batch, x_centred [B, D], and these weights.

        floor [L]: h above it is active, above 0 where there is none; k: and only each row's k
        largest, h times `by` [L].
        """
        self.screen, self.k = screen, k
        floors = torch.zeros_like(sae.b_enc) if floor is None else floor.detach()
        slack = screen.slack(sae.b_enc, floors)
        bias = (sae.b_enc - floors) / screen.t
        self.floors, self.biases = floors.numpy(), sae.b_enc.detach().numpy()
        self.x_centred, self.weights = x_centred.numpy(), sae.W_enc.t().detach().numpy()
        self.by = np.ones_like(self.biases) if by is None else by.detach().numpy()
        of_feature = [screen.residual, screen.norm]
        if k is None:
            of_feature = [bias + slack, *of_feature]
        else:
            weight = screen.t if by is None else screen.t * by
            of_feature = [bias, slack, *of_feature, weight]
        self.of_feature = [t.detach().numpy() for t in of_feature]
        self.of_row = [t.numpy() for t in (screen.u, screen.a, screen.g)]

    def find(self, rows: slice, entries: Entries) -> None:
        """A lane's active entries, with h for their values."""
        from saeray.sae import numba_kernels as kernels
        from saeray.sae import numba_screening

        self.look(rows, entries)
        kernels.exact_values(
            entries.offsets, entries.feature, entries.value,
            self.x_centred[rows], self.weights, self.biases, self.floors,
        )  # fmt: skip
        if self.k is not None:
            numba_screening.keep_largest(
                entries.offsets, entries.feature, entries.value, self.by, self.k
            )

    def look(self, rows: slice, entries: Entries) -> None:
        """Who might be active, a block of rows at a time."""
        from saeray.sae.numba_screening import select_candidates, select_largest

        n, at_once = 0, len(entries.product)
        of_row = [of[rows] for of in self.of_row]
        for first in range(rows.start, rows.stop, at_once):
            block = slice(first, min(first + at_once, rows.stop))
            product = entries.product[: block.stop - first]
            self.screen.product(block, product)
            done = 0
            while True:
                of_block = (
                    *of_row, first - rows.start + done, entries.offsets, entries.feature, n
                )  # fmt: skip
                some = product[done:].numpy()
                if self.k is None:
                    more, n = select_candidates(some, *self.of_feature, *of_block)
                else:
                    more, n = select_largest(some, *self.of_feature, self.k, *of_block)
                done += more
                if done == len(product):
                    break
                entries.resize(2 * len(entries.feature) + product.shape[1])


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


class ByFeature:
    """The entries of all lanes in the order of features, a tile of rows at a time."""

    def __init__(self, sae: SAE) -> None:
        self.d_sae = sae.d_sae
        self.dtype = sae.W_enc.detach().numpy().dtype
        self.sorted = np.empty((0, 3), self.dtype)  # row, value, dh
        self.starts = np.zeros(1, np.int64)  # [tiles * L + 1]

    def count(self, lanes: Sequence[Lane], parts: Sequence[Entries]) -> None:
        """Where entries of these lanes shall lie."""
        from saeray.sae import numba_kernels as kernels

        n, n_rows = sum(map(len, parts)), sum(b - a for a, b in lanes)
        self.lanes, self.parts = lanes, parts
        self.tile_rows = tile_rows(n, n_rows, self.d_sae)
        self.tiles = np.cumsum([0, *(-(-(b - a) // self.tile_rows) for a, b in lanes)])
        if n > len(self.sorted):
            self.sorted = np.empty((n + n // 4, 3), self.dtype)
        size = int(self.tiles[-1]) * self.d_sae + 1
        if len(self.starts) != size:
            self.starts = np.empty(size, np.int64)
        self.starts[:] = 0
        for tile, entries in zip(self.tiles, parts, strict=False):
            kernels.count_by_feature(
                entries.offsets, entries.feature, self.tile_rows, tile, self.d_sae, self.starts
            )
        np.cumsum(self.starts, out=self.starts)

    def place(self, values: Sequence[np.ndarray]) -> None:
        """Sorts them, each lane's with these values [n] and the dh that it has."""
        from saeray.sae import numba_kernels as kernels

        places = self.starts[:-1].copy()
        for lane, tile, entries, value in zip(
            self.lanes, self.tiles, self.parts, values, strict=False
        ):
            kernels.place_by_feature(
                entries.offsets, entries.feature, value, entries.dh,
                self.tile_rows, tile, self.d_sae, lane[0], places, self.sorted,
            )  # fmt: skip


def tile_rows(n: int, n_rows: int, d_sae: int) -> int:
    """Rows of a tile, a power of two: a feature shall have eight entries there, if a lane has them.

    A function of the run, since it decides where sums are cut.
    """
    rows = LEAST_TILE_ROWS
    while rows < LANE_ROWS and n * rows < 8 * d_sae * n_rows:
        rows *= 2
    return rows
