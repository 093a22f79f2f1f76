"""One optimizer step of every SAE of a pack on one batch: lanes, threads, buffers, ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeray.sae.auxk import auxk_gradients
from saeray.sae.batch_selection import choose_densely
from saeray.sae.decoder_norm import remove_parallel_component
from saeray.sae.ghost import ghost_gradients
from saeray.sae.gpu import sparse_step as gpu_step
from saeray.sae.gpu.dense_step import DenseSpace, dense_gradients
from saeray.sae.gpu.graphs import Made, RecordedSteps
from saeray.sae.gpu.sparse_step import CudaSpace
from saeray.sae.gradients import (
    Batch,
    Factors,
    Gradients,
    Lane,
    RunLanes,
    Workspace,
    lane_gradients,
    lanes_of,
)
from saeray.sae.metrics import Reconstruction, reconstruction
from saeray.sae.pre_act import pre_act_gradients
from saeray.sae.ranks import Ranks
from saeray.sae.sparse_step import SparseSpace, available, remove_parallel, sparse_gradients
from saeray.sae.trainer import SAETrainer

REMEDIES = {"ghost_grad": ghost_gradients, "auxk": auxk_gradients, "pre_act": pre_act_gradients}


class StepMetrics(NamedTuple):
    """Of one training batch; 0-d tensors, so nothing waits for a GPU unless someone looks."""

    mse: Tensor
    l1: Tensor  # the sparsity term without its coefficient, whatever it is
    ghost: Tensor  # the term for dead features
    overall: Tensor
    l0: Tensor  # mean features active per row
    reconstruction: Reconstruction


def batch_key(t: SAETrainer, x: Tensor, y: Tensor) -> tuple[Any, ...]:
    """SAEs that agree in this are trained on the same form of the same batch."""
    return (
        id(x), id(y), t.sae.W_enc.dtype, t.options.mse_normalization, t.activation_scale,
        t.output_scale,
    )  # fmt: skip


def batch_of(t: SAETrainer, x: Tensor, y: Tensor) -> Batch:
    """What is read at its hook point, as it sees it; y is x itself but for a transcoder."""

    def seen(rows: Tensor, scale: float) -> Tensor:
        rows = rows.to(t.sae.W_enc.dtype)
        return rows if scale == 1.0 else rows * scale

    of_y = seen(y, t.output_scale) if t.sae.is_transcoder else None
    return Batch.of(seen(x, t.activation_scale), t.options.mse_normalization, of_y)


class FreeList:
    """Buffers to use again: as many come to exist as threads ever needed at once."""

    def __init__(self, idle: list[Any], make: Callable[[], Any]) -> None:
        """idle: shared by all free lists of such buffers, which outlive whom they were made for."""
        self.idle, self.make = idle, make

    def take(self) -> Any:
        try:
            return self.idle.pop()  # atomic, so no lock
        except IndexError:
            return self.make()

    def put(self, buffer: Any) -> None:
        self.idle.append(buffer)


class PackStep:
    """Steps every SAE of a pack on one batch, on `threads` threads.

    SAEs are spread over the threads, each on one thread with its weights in that core's cache;
    those that are left over (all of them, for a pack of one) have their lanes spread instead.
    Neither changes a bit of the result.
    """

    def __init__(
        self,
        threads: int = 1,
        ranks: Ranks | None = None,
        *,
        sparse: bool = True,
        graphs: bool = True,
    ) -> None:
        """ranks: with others that step the same SAEs on the same batches; None: alone.

        sparse: an SAE with few active features is stepped by those alone, where Numba is installed,
        or Triton for a GPU. graphs: on a GPU, steps are recorded and replayed (`gpu.graphs`).
        """
        self.ranks = ranks or Ranks()
        self.sparse, self.graphs = sparse, graphs
        self.recorded = RecordedSteps()
        if threads < 1:
            raise ValueError(f"threads = {threads}: at least 1")
        self.threads = threads
        # PyTorch's own threads would split matrix products differently on different machines.
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self.buffers: dict[tuple[Any, ...], list[Any]] = {}
        self.lock = Lock()

    def step(
        self,
        trainers: Sequence[SAETrainer],
        x: Tensor | Sequence[tuple[Tensor, ...]],
        *,
        want_metrics: bool = False,
    ) -> list[StepMetrics | None]:
        """One optimizer step of every trainer on a batch (on the same device as the SAEs).

        x: [B, D] for all of them, or for each trainer what it reads, a tensor for each hook point:
        its input, and of a transcoder what it shall reconstruct, [B, O]. SAEs that are handed the
        same tensors share what is made of them.
        """
        if not trainers:
            return []
        each: Sequence[tuple[Tensor, ...]] = (
            x if not isinstance(x, Tensor) else [(x,)] * len(trainers)
        )
        batches: dict[tuple[Any, ...], Batch] = {}
        of: dict[SAETrainer, Batch] = {}
        for t, read in zip(trainers, each, strict=True):
            source, wanted = read[0], read[-1]
            key = batch_key(t, source, wanted)
            if key not in batches:
                batches[key] = batch_of(t, source, wanted)
            of[t] = batches[key]

        def advance(t: SAETrainer, run_lanes: RunLanes) -> StepMetrics | None:
            return self.advance(t, of[t], run_lanes, want_metrics)

        device = each[0][0].device.type
        if device == "cuda" or trainers[0].on_gpu:
            return self.step_on_gpu(trainers, of, want_metrics)
        if device != "cpu" or self.threads == 1:
            return [advance(t, map) for t in trainers]
        if self.ranks.size > 1:  # in the same order on every rank, or they wait for each other
            return [advance(t, self.pool.map) for t in trainers]
        whole = len(trainers) - len(trainers) % self.threads
        first = list(self.pool.map(lambda t: advance(t, map), trainers[:whole]))
        return first + [advance(t, self.pool.map) for t in trainers[whole:]]

    def step_on_gpu(
        self, trainers: Sequence[SAETrainer], of: dict[SAETrainer, Batch], want_metrics: bool
    ) -> list[StepMetrics | None]:
        """One SAE after another; those whose step is recorded, from their CUDA graph."""
        found: dict[SAETrainer, StepMetrics | None] = {}
        record = self.graphs and not want_metrics and self.ranks.size == 1
        for t in trainers:
            with gpu_step.product_precision(t.options.compute_dtype):
                if record and self.recorded.enqueue(t, of[t], self):
                    continue
                found[t] = self.advance(t, of[t], map, want_metrics)
        for t in self.recorded.finish():
            with gpu_step.product_precision(t.options.compute_dtype):
                found[t] = self.advance(t, of[t], map, want_metrics)
        return [found.get(t) for t in trainers]

    def advance(
        self, t: SAETrainer, batch: Batch, run_lanes: RunLanes, want_metrics: bool
    ) -> StepMetrics | None:
        """One SAE, one batch."""
        rule = t.rule
        t.begin_step(len(batch.x))
        dead = t.dead.nonzero().squeeze(1) if rule.remedy is not None else None
        grads = self.free("gradients", t, batch, lambda: Gradients(t.sae, rule.SUMS))
        residuals = self.free("errors", t, batch, lambda: torch.empty_like(batch.y))
        errors = residuals.take()
        if self.ranks.size > 1:
            errors.zero_()
        wanted = self.sparse and t.is_sparse_on(len(batch.x))
        sparse = wanted and not t.on_gpu and batch.x.device.type == "cpu" and available()
        if t.on_gpu:
            total = self.sum_on_gpu(t, batch, grads, errors, wanted, want_metrics)
        elif sparse:
            total = self.sum_of_entries(t, batch, run_lanes, grads, errors, want_metrics)
        else:
            total = self.sum_over_lanes(t, batch, run_lanes, grads, errors, want_metrics)
        has_dead = dead is not None and len(dead) > 0
        self.ranks.sum_(total.tensors())
        if has_dead or want_metrics:
            self.ranks.sum_((errors,))  # the others' rows are zeros here
        ghost = batch.x.new_zeros(())
        if dead is not None and has_dead:
            assert rule.remedy is not None
            remedy = REMEDIES[rule.remedy]
            ghost = remedy(rule, batch, errors, dead, total, run_lanes, self.ranks)
        total.b_dec.sub_(total.b_enc @ t.sae.W_enc.t())
        rule.finish_gradient(total)
        metrics = None
        if want_metrics:
            mse = (errors.square() / batch.normaliser).mean() * batch.weight
            l1 = total.l1 / len(batch.x)
            metrics = StepMetrics(
                mse=mse,
                l1=l1.clone(),
                ghost=ghost,
                overall=mse + rule.step.coefficient * l1 + total.inner + ghost,
                l0=total.fired.sum() / len(batch.x),
                reconstruction=reconstruction(batch.y, errors),
            )
        if t.on_gpu:
            pass  # Adam's kernel does it
        elif t.unit and sparse:
            remove_parallel(t.sae.W_dec, total.W_dec, run_lanes)
        elif t.unit:
            remove_parallel_component(total.W_dec, t.sae.W_dec)
        t.finish_step(total, len(batch.x))
        grads.put(total)
        residuals.put(errors)
        return metrics

    def sum_over_lanes(
        self,
        t: SAETrainer,
        batch: Batch,
        run_lanes: RunLanes,
        grads: FreeList,
        errors: Tensor,
        want_l1: bool,
    ) -> Gradients:
        """This rank's lanes of the batch, added up in their order; errors [B, D] is written to."""
        spaces = self.free("workspaces", t, batch, lambda: Workspace(t.sae, t.rule, len(batch.x)))
        copies = self.free("factors", t, batch, lambda: Factors(t.sae, bfloat16(t)))
        factors = copies.take().of(t.sae)

        def lane_sum(lane: Lane) -> Gradients:
            out, space = grads.take(), spaces.take()
            lane_gradients(
                t.sae,
                t.rule,
                batch,
                lane,
                errors=errors,
                out=out,
                space=space,
                factors=factors,
                want_l1=want_l1,
            )
            spaces.put(space)
            return out

        total: Gradients | None = None
        lanes = self.ranks.own(lanes_of(len(batch.x), batch.x.device, self.ranks.size))
        choose_densely(t.rule, batch.x, lanes, self.ranks)
        for part in run_lanes(lane_sum, lanes):
            if total is None:
                total = part
            else:
                total.add_(part)
                grads.put(part)
        if total is None:  # fewer lanes than ranks
            total = grads.take()
            total.zero_()
        copies.put(factors)
        return total

    def sum_of_entries(
        self,
        t: SAETrainer,
        batch: Batch,
        run_lanes: RunLanes,
        grads: FreeList,
        errors: Tensor,
        want_l1: bool,
    ) -> Gradients:
        """The same from active entries alone."""
        make = lambda: SparseSpace(t.sae, t.rule, len(batch.x), bfloat16(t))  # noqa: E731
        spaces = self.free("entries", t, batch, make)
        space, total = spaces.take(), grads.take()
        sparse_gradients(
            t.sae, t.rule, batch, errors=errors, out=total, space=space, run=run_lanes,
            ranks=self.ranks, want_l1=want_l1,
        )  # fmt: skip
        spaces.put(space)
        return total

    def sum_on_gpu(
        self,
        t: SAETrainer,
        batch: Batch,
        grads: FreeList,
        errors: Tensor,
        sparse: bool,
        want_l1: bool,
    ) -> Gradients:
        """The same on a GPU: this rank's rows at once, from active entries alone or densely."""
        penalty = t.rule.penalty
        assert isinstance(penalty, Tensor)
        total = grads.take()
        lanes = self.ranks.own(lanes_of(len(batch.x), batch.x.device, self.ranks.size))
        if not lanes:
            total.zero_()
            return total
        rows = slice(lanes[0][0], lanes[-1][1])
        mine = batch._replace(
            x=batch.x[rows], normaliser=batch.normaliser[rows], scale=batch.scale[rows]
        )
        gradients: Any = gpu_step.sparse_gradients if sparse else dense_gradients
        gradients(
            t.sae,
            mine,
            penalty=penalty,
            want_l1=want_l1,
            errors=errors[rows],
            out=total,
            space=self.space_on_gpu(t, mine, sparse),
            half=t.half,
        )
        return total

    def space_on_gpu(self, t: SAETrainer, batch: Batch, sparse: bool) -> Any:
        """One for all: nobody else asks for it meanwhile, since one step follows the other."""
        dtype, kind = t.options.compute_dtype, CudaSpace if sparse else DenseSpace
        make = lambda: kind(t.sae, len(batch.x), dtype)  # noqa: E731
        spaces = self.free(f"{kind.__name__} {dtype}", t, batch, make)
        space = spaces.take()
        spaces.put(space)
        return space

    def room_on_gpu(self, t: SAETrainer, batch: Batch, sparse: bool) -> int:
        """For how many entries there are buffers."""
        return self.space_on_gpu(t, batch, sparse).capacity if sparse else 0

    def sums_to_record(self, t: SAETrainer, batch: Batch, sparse: bool) -> Made:
        """In buffers that others use in between: on a GPU one step follows the other."""
        grads = self.free("gradients", t, batch, lambda: Gradients(t.sae, t.rule.SUMS))
        residuals = self.free("errors", t, batch, lambda: torch.empty_like(batch.y))
        errors = residuals.take()
        try:
            total = self.sum_on_gpu(t, batch, grads, errors, sparse, False)
        finally:
            residuals.put(errors)
        grads.put(total)
        buffers = (errors, self.space_on_gpu(t, batch, sparse))
        return Made(total, buffers, self.room_on_gpu(t, batch, sparse))

    def free(self, what: str, t: SAETrainer, batch: Batch, make: Callable[[], Any]) -> FreeList:
        """Buffers of one sort, for SAEs and batches like these."""
        kind = (
            what, tuple(t.sae.W_enc.shape), t.sae.d_out, t.sae.common, t.sae.W_enc.dtype,
            len(batch.x), bfloat16(t), type(t.rule), t.rule.widths,
        )  # fmt: skip
        with self.lock:
            return FreeList(self.buffers.setdefault(kind, []), make)


def bfloat16(t: SAETrainer) -> bool:
    return t.options.compute_dtype == "bfloat16"
