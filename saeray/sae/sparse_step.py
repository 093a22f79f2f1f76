"""The gradient of one SAE from its active entries alone: one dense product, the encoder's, is left.

The dense step is five products of B·D·L. Where a row has few active features, four of them touch
only those: x̂ and ⟨dx̂, W_dec[j]⟩ row after row, dW_dec[j] = Σ f dx̂ and dW_enc[j] = Σ dh (x - b_dec)
feature after feature. The same sums as `gradients.lane_gradients`, in another order; nothing is
approximated and nothing of [B, L] is kept: pre-activations live in the cache, a block at a time.

With compute_dtype bfloat16 the encoder's product finds which features are active, and the values
of those are computed again in float32.

Rows of a lane and features are independent of each other, so no number of threads changes a bit.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import threading

import numpy as np
import torch
from torch import Tensor

from saeray.sae.gradients import Batch, Factor, Gradients, Lane, RunLanes, block_rows, lanes_of
from saeray.sae.ranks import Ranks
from saeray.sae.standard import StandardSAE

FEATURES_PER_TASK = 512
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@functools.cache
def available() -> bool:
    """Whether Numba, which compiles the loops over entries, is installed here."""
    return importlib.util.find_spec("numba") is not None


def prepare() -> None:
    """Compiles the loops, or loads them, beside whatever the caller does next."""

    def warm_up() -> None:
        from saeray.sae import numba_kernels as kernels

        kernels.warm_up()

    if available():
        threading.Thread(target=warm_up, daemon=True).start()


class Entries:
    """The active entries of one lane, row after row, and the block that they are found in."""

    def __init__(self, sae: StandardSAE, n_rows: int, bfloat16: bool) -> None:
        narrow = torch.bfloat16 if bfloat16 else sae.W_enc.dtype
        self.rows = block_rows(sae, narrow.itemsize)
        self.bits = BITS[narrow]
        infinity = torch.tensor([-math.inf], dtype=narrow)
        self.floor = infinity.view(self.bits).numpy()[0]
        self.h = torch.empty(
            min(self.rows, n_rows), sae.d_sae, dtype=torch.bfloat16 if bfloat16 else sae.W_enc.dtype
        )
        self.dtype = sae.W_enc.detach().numpy().dtype
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


class SparseSpace:
    """What one SAE needs while it makes a step: some [B, D], and its entries."""

    def __init__(self, sae: StandardSAE, n_rows: int, bfloat16: bool) -> None:
        self.bfloat16 = bfloat16
        self.x_centred = sae.W_dec.new_empty(n_rows, sae.d_in)
        self.dx_hat = torch.zeros_like(self.x_centred)
        self.x_factor = Factor(self.x_centred, bfloat16)
        self.W_enc_factor = Factor(sae.W_enc, bfloat16)
        self.lanes: dict[Lane, Entries] = {}
        self.starts = np.zeros(sae.d_sae + 1, np.int64)
        self.row = np.empty(0, np.int32)
        self.value = self.dh = np.empty(0, sae.W_enc.detach().numpy().dtype)

    def entries(self, sae: StandardSAE, lane: Lane) -> Entries:
        if lane not in self.lanes:
            self.lanes[lane] = Entries(sae, lane[1] - lane[0], self.bfloat16)
        return self.lanes[lane]

    def make_room(self, n: int) -> None:
        if n > len(self.row):
            room = n + n // 4
            self.row = np.empty(room, np.int32)
            self.value, self.dh = np.empty(room, self.value.dtype), np.empty(room, self.dh.dtype)


def sparse_gradients(
    sae: StandardSAE,
    batch: Batch,
    *,
    penalty: float | Tensor,
    errors: Tensor,
    out: Gradients,
    space: SparseSpace,
    run: RunLanes,
    ranks: Ranks,
) -> None:
    """Writes the gradient of this rank's rows into `out` and their x̂ - x into errors [B, D].

    penalty: of an active feature in one row, as it enters the gradient; [L] where it is weighted.
    """
    from saeray.sae import numba_kernels as kernels

    torch.sub(batch.x, sae.b_dec, out=space.x_centred)
    x_factor, W_enc = space.x_factor.of(space.x_centred), space.W_enc_factor.of(sae.W_enc)
    b_enc = sae.b_enc.to(x_factor.dtype)
    lanes = list(ranks.own(lanes_of(len(batch.x), batch.x.device, ranks.size)))
    per_feature = (
        penalty.numpy()
        if isinstance(penalty, Tensor)
        else np.full(sae.d_sae, penalty, space.dh.dtype)
    )
    scale = batch.scale.squeeze(1).numpy()
    arrays = {
        name: tensor.detach().numpy()
        for name, tensor in {
            "W_enc": sae.W_enc.t(),
            "W_dec": sae.W_dec,
            "b_enc": sae.b_enc,
            "b_dec": sae.b_dec,
            "x": batch.x,
            "x_centred": space.x_centred,
            "dx_hat": space.dx_hat,
            "errors": errors,
        }.items()
    }

    def lane_entries(lane: Lane) -> Entries:
        rows = slice(*lane)
        entries = space.entries(sae, lane)
        select(x_factor[rows], W_enc, b_enc, entries)
        if space.bfloat16:
            kernels.exact_values(
                entries.offsets, entries.feature, entries.value,
                arrays["x_centred"][rows], arrays["W_enc"], arrays["b_enc"],
            )  # fmt: skip
        n = len(entries)
        kernels.decode_rows(
            entries.offsets, entries.feature, entries.value, arrays["W_dec"], arrays["b_dec"],
            arrays["x"][rows], scale[rows], arrays["errors"][rows], arrays["dx_hat"][rows],
            entries.dh,
        )  # fmt: skip
        entries.dh[:n] += per_feature[entries.feature[:n]]
        return entries

    parts = list(run(lane_entries, lanes))
    space.make_room(sum(map(len, parts)))
    space.starts[:] = 0
    for entries in parts:
        kernels.count_features(entries.feature, len(entries), space.starts)
    np.cumsum(space.starts, out=space.starts)
    places = space.starts[:-1].copy()
    for (first, _), entries in zip(lanes, parts, strict=True):
        kernels.place_by_feature(
            entries.offsets, entries.feature, entries.value, entries.dh, first, places,
            space.row, space.value, space.dh,
        )  # fmt: skip

    def features(task: Lane) -> None:
        kernels.weight_gradients(
            *task, space.starts, space.row, space.value, space.dh,
            arrays["x_centred"], arrays["dx_hat"],
            out.W_enc.t().numpy(), out.W_dec.numpy(), out.b_enc.numpy(), out.fired.numpy(),
            out.f.numpy(),
        )  # fmt: skip

    for _ in run(features, tasks_of(sae.d_sae)):
        pass
    own = slice(lanes[0][0], lanes[-1][1]) if lanes else slice(0, 0)
    torch.sum(space.dx_hat[own], dim=0, out=out.b_dec)
    torch.sum(out.f, dim=0, out=out.l1)


def select(x_centred: Tensor, W_enc: Tensor, b_enc: Tensor, entries: Entries) -> None:
    """Finds a lane's active entries, a block of pre-activations at a time."""
    from saeray.sae import numba_kernels as kernels

    n = 0
    for first in range(0, len(x_centred), entries.rows):
        x = x_centred[first : first + entries.rows]
        h = entries.h[: len(x)]
        torch.addmm(b_enc, x, W_enc, out=h)
        bits = h.view(entries.bits).numpy()
        done = 0
        while True:
            more, n = kernels.select_active(
                bits[done:], entries.floor, first + done, entries.offsets, entries.feature, n
            )
            done += more
            if done == len(x):
                break
            entries.resize(2 * len(entries.feature) + h.shape[1])
        if h.dtype != torch.bfloat16:
            kernels.take_values(
                h.numpy(), first, len(x), entries.offsets, entries.feature, entries.value
            )


def remove_parallel(W_dec: Tensor, gradient: Tensor, run: RunLanes) -> None:
    """`standard.remove_parallel_component` in one pass over memory."""
    from saeray.sae import numba_kernels as kernels

    def rows(task: Lane) -> None:
        kernels.remove_parallel(*task, gradient.numpy(), W_dec.numpy())

    for _ in run(rows, tasks_of(len(W_dec))):
        pass


def tasks_of(d_sae: int) -> list[Lane]:
    """Features that a thread takes at once; they are independent, so no bit depends on it."""
    return [(a, min(a + FEATURES_PER_TASK, d_sae)) for a in range(0, d_sae, FEATURES_PER_TASK)]
