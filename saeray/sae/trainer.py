"""One SAE in training (weights, Adam, counters, schedule) and the step that advances it.

All state of the loop lives in `SAETrainer`, and `state()` is the checkpoint: an SAE restored from
it continues bit for bit. One step, in the order the guide's hyper-parameters were tuned for:

    scale W_dec rows to norm 1 · (every window) firing statistics start anew · dead mask ·
    forward, loss, counters, gradient · remove W_dec.grad's component along each row · Adam · LR

The scaling of a step's start is done at the end of the step before (and on the initial weights),
so the weights are at rest with unit rows whenever anyone looks at them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeray.sae.gradients import (
    Batch,
    Gradients,
    Lane,
    RunLanes,
    Workspace,
    ghost_gradients,
    lane_gradients,
    lanes_of,
)
from saeray.sae.metrics import Reconstruction, log10_frequency, reconstruction
from saeray.sae.ranks import Ranks
from saeray.sae.schedules import lr_multiplier
from saeray.sae.standard import StandardSAE, remove_parallel_component, scale_rows_to_unit_norm

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What a step depends on beside the weights and the batch."""

    lr: float
    l1_coefficient: float
    total_steps: int
    lr_scheduler_name: str = "constantwithwarmup"
    lr_warm_up_steps: int = 500
    lr_end: float = 0.0
    num_cycles: int = 1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    mse_normalization: str = "centred_norm"
    use_ghost_grads: bool = False
    feature_sampling_window: int = 2000
    dead_feature_window: int = 1000
    dead_feature_threshold: float = 1e-8


class StepMetrics(NamedTuple):
    """Of one training batch; 0-d tensors, so nothing waits for a GPU unless someone looks."""

    mse: Tensor
    l1: Tensor  # not multiplied by the coefficient
    ghost: Tensor
    overall: Tensor
    l0: Tensor  # mean features active per row
    reconstruction: Reconstruction


class SAETrainer:
    """Trains one SAE; `PackStep` advances it."""

    def __init__(self, sae: StandardSAE, options: TrainingOptions) -> None:
        self.sae = sae
        self.options = options
        scale_rows_to_unit_norm(sae.W_dec)
        self.adam = torch.optim.Adam(
            [getattr(sae, name) for name in PARAMETERS],
            lr=options.lr,
            betas=(options.adam_beta1, options.adam_beta2),
            fused=sae.W_enc.device.type in ("cpu", "cuda"),
        )
        device = sae.W_enc.device
        self.step = 0
        self.steps_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.fired_in_window = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.tokens_in_window = 0
        # Frequencies of the last full window: what is reported until the next one is full.
        # float64, so on the CPU: not every device has it.
        self.last_frequency = torch.zeros(sae.d_sae, dtype=torch.float64)

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        o = self.options
        return o.lr * lr_multiplier(
            o.lr_scheduler_name,
            self.step,
            total_steps=o.total_steps,
            warm_up_steps=o.lr_warm_up_steps,
            lr_end=o.lr_end,
            num_cycles=o.num_cycles,
        )

    @property
    def finished(self) -> bool:
        return self.step >= self.options.total_steps

    @property
    def dead(self) -> Tensor:
        """Boolean [L]: features silent for more than dead_feature_window steps."""
        return self.steps_since_fired > self.options.dead_feature_window

    @property
    def firing_frequency(self) -> Tensor:
        """Share of tokens each feature fired on, in the last full window: [L] float64 on the CPU.

        In a run's first window, which may be all there is, the part that has been seen.
        """
        window = self.options.feature_sampling_window
        full_before = self.step >= window
        if self.tokens_in_window == 0 or (full_before and self.step % window):
            return self.last_frequency
        return self.fired_in_window.cpu().double() / self.tokens_in_window

    def begin_step(self) -> None:
        window = self.options.feature_sampling_window
        if self.step and self.step % window == 0:
            self.last_frequency = self.firing_frequency
            self.fired_in_window.zero_()
            self.tokens_in_window = 0

    def finish_step(self, grad: Gradients, n_rows: int) -> None:
        """Counters, then Adam on the gradient of one whole batch."""
        self.fired_in_window += grad.fired.to(torch.int64)
        self.tokens_in_window += n_rows
        self.steps_since_fired += 1
        self.steps_since_fired.masked_fill_(grad.fired > 0, 0)

        remove_parallel_component(grad.W_dec, self.sae.W_dec)
        for name in PARAMETERS:
            getattr(self.sae, name).grad = getattr(grad, name)
        self.adam.param_groups[0]["lr"] = self.lr
        self.adam.step()
        for name in PARAMETERS:
            getattr(self.sae, name).grad = None  # the buffers belong to the step, not to the SAE
        scale_rows_to_unit_norm(self.sae.W_dec)
        self.step += 1

    def feature_metrics(self) -> dict[str, float]:
        """Counts over features, keyed as in wandb."""
        frequency = self.firing_frequency
        return {
            "metrics/mean_log10_feature_sparsity": float(log10_frequency(frequency).mean()),
            "sparsity/dead_features": int(self.dead.sum()),
            "sparsity/below_dead_feature_threshold": int(
                (frequency < self.options.dead_feature_threshold).sum()
            ),
            "sparsity/mean_passes_since_fired": float(self.steps_since_fired.cpu().double().mean()),
            "sparsity/below_1e-5": int((frequency < 1e-5).sum()),
            "sparsity/below_1e-6": int((frequency < 1e-6).sum()),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything but the weights: tensors and plain numbers."""
        tensors = {
            "steps_since_fired": self.steps_since_fired,
            "fired_in_window": self.fired_in_window,
            "last_frequency": self.last_frequency,
        }
        for name in PARAMETERS:
            moments = self.adam.state.get(getattr(self.sae, name), {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in moments:
                    tensors[f"adam.{name}.{key}"] = moments[key]
        return tensors, {"step": self.step, "tokens_in_window": self.tokens_in_window}

    @classmethod
    def resumed(
        cls,
        sae: StandardSAE,
        options: TrainingOptions,
        tensors: dict[str, Tensor],
        numbers: dict[str, Any],
    ) -> SAETrainer:
        """The trainer whose `state()` this is, with the weights `sae` of the same moment.

        The weights are taken as they are: scaling rows that already have norm 1 once more could
        change their last bits, and a resumed run would no longer be the uninterrupted one.
        """
        weights = sae.W_dec.clone()
        self = cls(sae, options)
        sae.W_dec.copy_(weights)
        self.step = int(numbers["step"])
        self.tokens_in_window = int(numbers["tokens_in_window"])
        for name in ("steps_since_fired", "fired_in_window", "last_frequency"):
            getattr(self, name).copy_(tensors[name])
        for name in PARAMETERS:
            if f"adam.{name}.exp_avg" not in tensors:
                continue
            parameter = getattr(sae, name)
            moments = {
                key: tensors[f"adam.{name}.{key}"].to(parameter).clone()
                for key in ("exp_avg", "exp_avg_sq")
            }
            step = torch.tensor(float(self.step))
            if self.adam.defaults["fused"]:  # otherwise Adam keeps it on the CPU
                step = step.to(parameter.device)
            self.adam.state[parameter] = {"step": step, **moments}
        return self


class FreeList:
    """Buffers to use again: as many come to exist as threads ever needed at once."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.idle: list[Any] = []

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

    def __init__(self, threads: int = 1, ranks: Ranks | None = None) -> None:
        """ranks: with others that step the same SAEs on the same batches; None: alone."""
        self.ranks = ranks or Ranks()
        if threads < 1:
            raise ValueError(f"threads = {threads}: at least 1")
        self.threads = threads
        # PyTorch's own threads would split matrix products differently on different machines.
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self.buffers: dict[tuple[Any, ...], FreeList] = {}
        self.lock = Lock()

    def step(
        self, trainers: Sequence[SAETrainer], x: Tensor, *, want_metrics: bool = False
    ) -> list[StepMetrics | None]:
        """One optimizer step of every trainer on batch x [B, D] (the same device as the SAEs)."""
        batches: dict[tuple[Any, str], Batch] = {}
        for t in trainers:
            key = (t.sae.W_enc.dtype, t.options.mse_normalization)
            if key not in batches:
                batches[key] = Batch.of(x.to(key[0]), key[1])

        def advance(t: SAETrainer, run_lanes: RunLanes) -> StepMetrics | None:
            batch = batches[t.sae.W_enc.dtype, t.options.mse_normalization]
            return self.advance(t, batch, run_lanes, want_metrics)

        if x.device.type != "cpu" or self.threads == 1:
            return [advance(t, map) for t in trainers]
        if self.ranks.size > 1:  # in the same order on every rank, or they wait for each other
            return [advance(t, self.pool.map) for t in trainers]
        whole = len(trainers) - len(trainers) % self.threads
        results = list(self.pool.map(lambda t: advance(t, map), trainers[:whole]))
        return results + [advance(t, self.pool.map) for t in trainers[whole:]]

    def advance(
        self, t: SAETrainer, batch: Batch, run_lanes: RunLanes, want_metrics: bool
    ) -> StepMetrics | None:
        """One SAE, one batch."""
        t.begin_step()
        dead = t.dead.nonzero().squeeze(1) if t.options.use_ghost_grads else None
        kind = (tuple(t.sae.W_enc.shape), t.sae.W_enc.dtype, len(batch.x))
        grads = self.free("gradients", kind, lambda: Gradients(t.sae))
        residuals = self.free("errors", kind, lambda: torch.empty_like(batch.x))
        errors = residuals.take()
        if self.ranks.size > 1:
            errors.zero_()
        total = self.sum_over_lanes(t, batch, run_lanes, grads, errors, want_metrics)
        has_dead = dead is not None and len(dead) > 0
        self.ranks.sum_(total.tensors())
        if has_dead or want_metrics:
            self.ranks.sum_((errors,))  # the others' rows are zeros here
        ghost = batch.x.new_zeros(())
        if dead is not None and has_dead:
            ghost = ghost_gradients(
                t.sae, batch, errors, dead, t.options.mse_normalization, total, run_lanes,
                self.ranks,
            )  # fmt: skip
        total.b_dec.sub_(total.b_enc @ t.sae.W_enc.t())
        metrics = None
        if want_metrics:
            mse = (errors.square() / batch.normaliser).mean()
            l1 = total.l1 / len(batch.x)
            metrics = StepMetrics(
                mse=mse,
                l1=l1.clone(),
                ghost=ghost,
                overall=mse + t.options.l1_coefficient * l1 + ghost,
                l0=total.fired.sum() / len(batch.x),
                reconstruction=reconstruction(batch.x, errors),
            )
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
        kind = (tuple(t.sae.W_enc.shape), t.sae.W_enc.dtype, len(batch.x))
        spaces = self.free("workspaces", kind, lambda: Workspace(t.sae, len(batch.x)))

        def lane_sum(lane: Lane) -> Gradients:
            out, space = grads.take(), spaces.take()
            lane_gradients(
                t.sae,
                batch,
                lane,
                l1_coefficient=t.options.l1_coefficient,
                errors=errors,
                out=out,
                space=space,
                want_l1=want_l1,
            )
            spaces.put(space)
            return out

        total: Gradients | None = None
        lanes = lanes_of(len(batch.x), batch.x.device, self.ranks.size)
        for part in run_lanes(lane_sum, self.ranks.own(lanes)):
            if total is None:
                total = part
            else:
                total.add_(part)
                grads.put(part)
        if total is None:  # fewer lanes than ranks
            total = grads.take()
            total.zero_()
        return total

    def free(self, what: str, kind: tuple[Any, ...], make: Callable[[], Any]) -> FreeList:
        with self.lock:
            return self.buffers.setdefault((what, *kind), FreeList(make))
