"""The gradient of one SAE from its active entries alone, found by a product in eight bits.

The dense step is five products of B·D·L. Where a row has few active features, four of them touch
only those: x̂ and ⟨dx̂, W_dec[j]⟩ row after row, dW_dec[j] = Σ f dx̂ and dW_enc[j] = Σ dh (x - b_dec)
feature after feature. The fifth, the encoder's, only has to tell which those are: `screening`. The
same sums as `gradients.lane_gradients`, in another order; nothing is approximated and nothing of
[B, L] is kept: the product lives in the cache, a block at a time.

Rows of a lane and features are independent of each other, so no number of threads changes a bit.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.architectures.rule import Active, Rule
from saeray.sae.batch_selection import bounds, smallest_of
from saeray.sae.entries import ByFeature, Entries, Selection, keep_at_least
from saeray.sae.gradients import (
    Batch,
    Factors,
    Gradients,
    Lane,
    RunLanes,
    lanes_of,
    levels_of,
    without_skip,
)
from saeray.sae.ranks import Ranks
from saeray.sae.screening import Screen, cuts


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


class SparseSpace:
    """What one SAE needs while it makes a step: some [B, D], and its entries."""

    def __init__(self, sae: SAE, rule: Rule, n_rows: int, bfloat16: bool) -> None:
        self.x_centred = sae.W_dec.new_empty(n_rows, sae.d_in)
        self.dx_hat = sae.W_dec.new_zeros(len(rule.widths), n_rows, sae.d_out)
        # Of what the gate's latents reconstruct.
        self.dx_gate = sae.W_dec.new_empty((n_rows, sae.d_out) if rule.has_gate else (0, 0))
        self.factors = Factors(sae, bfloat16) if sae.W_skip is not None else None
        self.target = sae.W_dec.new_empty((n_rows, sae.d_out) if self.factors else (0, 0))
        self.screen = Screen(sae, n_rows)
        self.lanes: dict[Lane, Entries] = {}
        self.by_feature = ByFeature(sae)

    def entries(self, sae: SAE, lane: Lane) -> Entries:
        if lane not in self.lanes:
            self.lanes[lane] = Entries(sae, lane[1] - lane[0], self.screen)
        return self.lanes[lane]


def sparse_gradients(
    sae: SAE,
    rule: Rule,
    batch: Batch,
    *,
    errors: Tensor,
    out: Gradients,
    space: SparseSpace,
    run: RunLanes,
    ranks: Ranks,
    want_l1: bool = False,
) -> None:
    """Writes the gradient of this rank's rows into `out` and their x̂ - y into errors [B, O]."""
    from saeray.sae import numba_kernels as kernels

    torch.sub(batch.x, sae.b_dec, out=space.x_centred)
    lanes = list(ranks.own(lanes_of(len(batch.x), batch.x.device, ranks.size)))
    step = SparseStep(sae, rule, batch, errors, space, run, want_l1)
    wanted = rule.n_of_batch(len(batch.x))
    if wanted is not None:
        step.choose_of_batch(wanted, lanes, run, ranks)
    done = list(run(step.of_lane, lanes))
    parts = [d.entries for d in done]
    space.by_feature.count(lanes, parts)
    space.by_feature.place([entries.value for entries in parts])
    starts, entries = space.by_feature.starts, space.by_feature.sorted

    def features(task: tuple[int, int, int]) -> None:
        first, last, level = task
        kernels.weight_gradients(
            first, last, starts, entries, space.x_centred.numpy(), space.dx_hat[level].numpy(),
            out.W_enc.t().numpy(), out.W_dec.numpy(), out.b_enc.numpy(), out.fired.numpy(),
            out.f.numpy(),
        )  # fmt: skip

    for _ in run(features, tasks_of(levels_of(rule))):
        pass
    own = slice(lanes[0][0], lanes[-1][1]) if lanes else slice(0, 0)
    out.b_dec.zero_()
    torch.sum(space.dx_hat[0, own], dim=0, out=out.b_out)
    if out.W_skip is not None:
        skip_gradient(batch.x[own], space.dx_hat[0, own], space, out.W_skip, first=True)
        if rule.gate_teaches_decoder:
            skip_gradient(batch.x[own], space.dx_gate[own], space, out.W_skip, first=False)
    if rule.gate_teaches_decoder:
        space.by_feature.place([d.gate for d in done])

        def decoder(task: tuple[int, int, int]) -> None:
            kernels.add_decoder_gradient(
                *task[:2], starts, entries, space.dx_gate.numpy(), out.W_dec.numpy()
            )  # fmt: skip

        for _ in run(decoder, tasks_of(levels_of(rule))):
            pass
        out.b_out.add_(space.dx_gate[own].sum(dim=0))
    if rule.penalty is not None:
        torch.sum(out.f, dim=0, out=out.l1)
    else:
        out.l1.fill_(sum(d.sparsity for d in done))
    out.inner.fill_(sum(d.inner for d in done))
    for name, total in out.extra.items():
        total.copy_(torch.from_numpy(sum((d.sums[name] for d in done), np.zeros(sae.d_sae))))


def skip_gradient(
    x: Tensor, dx_hat: Tensor, space: SparseSpace, total: Tensor, *, first: bool
) -> None:
    """total [D, O] += xᵀ dx_hat of rows x [R, D], dx_hat [R, O]."""
    assert space.factors is not None
    if len(x):
        space.factors.add_product(x.t(), dx_hat, total, first)
    elif first:
        total.zero_()


NO_GATE = np.empty(0)


class OfLane(NamedTuple):
    """What is found in one lane beside errors and dx_hat."""

    entries: Entries
    sparsity: float  # of the sparsity term, where it was asked for
    inner: float  # of other squared errors
    sums: dict[str, np.ndarray]  # [L] float64, of `Rule.SUMS`
    gate: np.ndarray = NO_GATE  # [n] `Rule.gate_latents`


class SparseStep:
    """One step of one SAE, lane by lane."""

    def __init__(
        self,
        sae: SAE,
        rule: Rule,
        batch: Batch,
        errors: Tensor,
        space: SparseSpace,
        run: RunLanes,
        want_l1: bool,
    ) -> None:
        self.sae, self.rule, self.space, self.want_l1 = sae, rule, space, want_l1
        self.chosen = False
        self.penalty: np.ndarray | None = None
        if isinstance(rule.penalty, Tensor):
            self.penalty = rule.penalty.numpy()
        elif rule.penalty is not None:
            self.penalty = np.full(sae.d_sae, rule.penalty, space.by_feature.dtype)
        self.widths = np.array(rule.widths)
        self.scale = batch.scale.squeeze(1).numpy()
        self.W_dec, self.b_out = sae.W_dec.detach().numpy(), sae.b_out.detach().numpy()
        self.batch, self.errors = batch, errors.numpy()
        # What features and bias are to make: y, or what a skip connection leaves of it.
        self.target = (batch.y if space.factors is None else space.target).numpy()
        space.screen.set(sae, space.x_centred, run)
        self.selection = self.select(rule.floor())

    def select(self, floor: Tensor | None) -> Selection:
        return Selection(
            self.sae, self.space.screen, self.space.x_centred,
            floor=floor, k=self.rule.k, by=self.rule.selected_by(),
        )  # fmt: skip

    def choose_of_batch(
        self, wanted: int, lanes: Sequence[Lane], run: RunLanes, ranks: Ranks
    ) -> None:
        """Finds the entries of all lanes: so many, the largest of the whole batch."""
        sae, rule, x = self.sae, self.rule, self.space.x_centred
        by = rule.selected_by()
        for bound in bounds(rule, x, wanted):
            floor = sae.b_enc.new_full((sae.d_sae,), bound)
            self.selection = self.select(floor if by is None else floor / by)

            def values(lane: Lane) -> Tensor:
                entries = self.space.entries(sae, lane)
                self.selection.find(slice(*lane), entries)
                n = len(entries)
                h, feature = map(torch.from_numpy, (entries.value[:n], entries.feature[:n]))
                return h.clone() if by is None else h * by[feature]

            found = torch.cat([x.new_empty(0), *run(values, lanes)])
            smallest, n_found = smallest_of(found, wanted, ranks)
            if n_found >= wanted:
                break
        rule.choose(smallest)
        for lane in lanes:
            keep_at_least(self.space.entries(sae, lane), smallest, by)
        self.chosen = True

    def of_lane(self, lane: Lane) -> OfLane:
        from saeray.sae import numba_kernels as kernels

        rows = slice(*lane)
        entries = self.space.entries(self.sae, lane)
        if self.space.factors is not None:
            self.space.target[rows] = without_skip(self.sae, self.batch, rows, self.space.factors)
        if not self.chosen:
            self.selection.find(rows, entries)
        n = len(entries)
        feature = entries.feature[:n]
        if self.penalty is not None:
            self.decode(rows, entries)
            entries.dh[:n] += self.penalty[feature]
            return OfLane(entries, 0.0, 0.0, {})
        rule, index = self.rule, torch.from_numpy(feature)
        counts = np.diff(entries.offsets)

        def at(parameter: Tensor) -> Tensor:
            return parameter[index]

        def of_row(values: Tensor) -> Tensor:
            return values.repeat_interleave(torch.from_numpy(counts))

        def row_l0() -> Tensor:
            before = np.concatenate(([0], np.cumsum(entries.value[:n] != 0)))
            return torch.from_numpy(np.diff(before[entries.offsets])).to(h.dtype)

        h = torch.from_numpy(entries.value[:n])
        h = h.clone() if rule.keeps_h else h
        f = torch.from_numpy(entries.value[:n])
        df_gate, inner, gate = None, 0.0, NO_GATE
        if rule.has_gate:
            f.copy_(rule.gate_latents(h))
            inner, gate = self.decode_gate(rows, entries), entries.value[:n].copy()
            df_gate = torch.from_numpy(entries.dh[:n].copy())
        f.copy_(rule.latents(h, at))
        if len(self.widths) == 1:
            self.decode(rows, entries)
        else:
            inner = kernels.decode_levels(
                entries.offsets, entries.feature, entries.value, self.widths, self.W_dec,
                self.b_out, self.target[rows], self.scale[rows], self.errors[rows],
                self.space.dx_hat[:, rows].numpy(), entries.dh,
            )  # fmt: skip
        df = torch.from_numpy(entries.dh[:n])
        active = Active(h, f, df, at, row_l0, of_row, df_gate)
        sparsity = float(rule.sparsity(active)) if self.want_l1 else 0.0
        pulled = rule.pull_back(active)
        df.copy_(pulled.dh)
        sums = {
            name: np.bincount(feature, values.numpy(), minlength=self.sae.d_sae)
            if (values := pulled.sums.get(name)) is not None
            else np.zeros(self.sae.d_sae)
            for name in rule.SUMS
        }
        return OfLane(entries, sparsity, inner, sums, gate)

    def decode(self, rows: slice, entries: Entries) -> None:
        """Errors and dx_hat of the lane's rows, and df into the entries' dh."""
        from saeray.sae import numba_kernels as kernels

        kernels.decode_rows(
            entries.offsets, entries.feature, entries.value, self.W_dec, self.b_out,
            self.target[rows], self.scale[rows], self.errors[rows],
            self.space.dx_hat[0, rows].numpy(), entries.dh,
        )  # fmt: skip

    def decode_gate(self, rows: slice, entries: Entries) -> float:
        """Half of Σ scale ‖error‖² of what the gate's latents reconstruct; df into dh.

        And dx_gate of the lane's rows.
        """
        from saeray.sae import numba_kernels as kernels

        target, dx_hat = self.target[rows], self.space.dx_gate[rows].numpy()
        error = np.empty_like(target)
        kernels.decode_rows(
            entries.offsets, entries.feature, entries.value, self.W_dec, self.b_out,
            target, self.scale[rows], error, dx_hat, entries.dh,
        )  # fmt: skip
        return float((dx_hat * error).sum(dtype=np.float64)) / 2


def remove_parallel(W_dec: Tensor, gradient: Tensor, run: RunLanes) -> None:
    """`standard.remove_parallel_component` in one pass over memory."""
    from saeray.sae import numba_kernels as kernels

    def rows(task: tuple[int, int, int]) -> None:
        kernels.remove_parallel(*task[:2], gradient.numpy(), W_dec.numpy())

    for _ in run(rows, tasks_of([(0, len(W_dec))])):
        pass


def tasks_of(levels: Sequence[Lane]) -> list[tuple[int, int, int]]:
    """Features from, to that a thread takes at once, and their level.

    Features are independent of each other, so no bit depends on it.
    """
    return [
        (from_ + a, from_ + b, level)
        for level, (from_, to) in enumerate(levels)
        for a, b in cuts(to - from_)
    ]
