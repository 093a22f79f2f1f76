"""One SAE in training: weights, Adam, counters, schedule. `pack_step` advances it.

All state of the loop lives in `SAETrainer`, and `state()` is the checkpoint: an SAE restored from
it continues bit for bit. One step, in the order the guide's hyper-parameters were tuned for:

    scale W_dec rows to norm 1 · (every window) firing statistics start anew · dead mask ·
    forward, loss, counters, gradient · remove W_dec.grad's component along each row · clip ·
    Adam · LR

Rows are scaled, and components along them removed, where decoder_norm is "unit". The scaling of a
step's start is done at the end of the step before (and on the initial weights), so the weights are
at rest with unit rows whenever anyone looks at them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saeray.sae import resampling
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.architectures.base import PARAMETERS, SAE
from saeray.sae.architectures.rule import StepContext
from saeray.sae.decoder_norm import scale_rows_to_unit_norm
from saeray.sae.gpu import sparse_step as gpu_step
from saeray.sae.gpu.adam import HalfWeights, adam_rates, fused_adam_rows
from saeray.sae.gradients import Gradients
from saeray.sae.metrics import log10_frequency
from saeray.sae.options import TrainingOptions
from saeray.sae.resampling import lr_factor
from saeray.sae.schedules import l1_multiplier, lr_multiplier
from saeray.sae.steering import Steering

# Which of the two ways a step is computed is decided anew every so many steps, by the share of
# features active in the step before. Part of what a run is a function of.
STEPS_PER_DECISION = 10
SPARSE_BELOW = {"float64": 1 / 8, "float32": 1 / 5, "tf32": 1 / 5, "bfloat16": 1 / 10}
# There the dense step gains the more from a lower precision. docs/performance.md has the table.
SPARSE_BELOW_ON_GPU = {"float32": 1 / 20, "tf32": 1 / 75, "bfloat16": 1 / 200}
SPARSE_ROWS_ON_GPU = 2048  # with fewer in a batch it is never the faster one


class SAETrainer:
    """Trains one SAE; `PackStep` advances it."""

    def __init__(
        self,
        sae: SAE,
        options: TrainingOptions,
        activation_scale: float = 1.0,
        output_scale: float = 1.0,
    ) -> None:
        """activation_scale: what activations are multiplied by before the SAE sees them.

        output_scale: the same, of what a transcoder reconstructs.
        """
        self.sae = sae
        self.options = options
        self.rule = ARCHITECTURES[options.architecture].rule(sae, options)
        self.steering: Steering | None = None
        if options.target_l0 and self.rule.is_steered:
            self.steering = Steering(options, thresholds=self.rule.has_thresholds)
        self.unit = options.decoder_norm == "unit"
        self.activation_scale, self.output_scale = activation_scale, output_scale
        if self.unit:
            scale_rows_to_unit_norm(sae.W_dec)
        self.adam = torch.optim.Adam(
            list(sae.tensors.values()),
            lr=options.lr,
            betas=(options.adam_beta1, options.adam_beta2),
            fused=sae.W_enc.device.type in ("cpu", "cuda"),
        )
        device = sae.W_enc.device
        # On a GPU with Triton, Adam and what belongs to it are one kernel, from the first step on.
        self.on_gpu = gpu_step.available(device) and sae.W_enc.dtype == torch.float32
        self.on_gpu = self.on_gpu and self.rule.penalty is not None and not sae.is_transcoder
        self.half: HalfWeights | None = None
        # On a GPU: what changes from step to step, in its memory, where a CUDA graph reads it.
        self.numbers = torch.zeros(3, device=device)  # penalty of an active entry; `adam_rates`
        if self.on_gpu and options.compute_dtype == "bfloat16":
            self.half = HalfWeights(sae)
        self.step = 0
        self.resampled: int | None = None  # the step before which features last were
        self.n_resampled = 0  # features, in all
        self.sparse = False  # whether the step is computed from active entries alone
        self.active_share = 1.0  # of features and rows, in the step before the next decision
        self.steps_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.fired_in_window = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        self.tokens_in_window = 0
        # Frequencies of the last full window: what is reported until the next one is full.
        # float64, so on the CPU: not every device has it.
        self.last_frequency = torch.zeros(sae.d_sae, dtype=torch.float64)

    @property
    def published(self) -> SAE:
        """The SAE of activations as they are, whatever scale it is trained at."""
        published = self.rule.published()
        return published.for_unscaled(self.activation_scale, self.output_scale).without_centre()

    @property
    def lr(self) -> float:
        """Learning rate of the coming step."""
        o = self.options
        return (
            o.lr
            * lr_factor(o, self.step, self.resampled)
            * lr_multiplier(
                o.lr_scheduler_name,
                self.step,
                total_steps=o.total_steps,
                warm_up_steps=o.lr_warm_up_steps,
                lr_end=o.lr_end,
                num_cycles=o.num_cycles,
                decay_steps=o.lr_decay_steps,
            )
        )

    @property
    def coefficient(self) -> float:
        """Of the sparsity term, in the coming step."""
        steered = 1.0
        if self.steering is not None and not self.rule.has_thresholds:
            steered = self.steering.multiplier
        warm_up = l1_multiplier(self.step, self.options.l1_warm_up_steps)
        return self.rule.coefficient * steered * warm_up

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

    def begin_step(self, n_rows: int) -> None:
        self.decide()
        if self.on_gpu:
            # From memory that isn't pinned, so it is read before this returns.
            self.numbers.copy_(torch.tensor(self.numbers_of_step(n_rows)), non_blocking=True)
        self.tell_rule(n_rows)

    def decide(self) -> None:
        """What depends on which step it is: how it is computed, and whose window it is in."""
        if self.step % STEPS_PER_DECISION == 0:
            limits = SPARSE_BELOW_ON_GPU if self.on_gpu else SPARSE_BELOW
            self.sparse = self.active_share < limits[self.options.compute_dtype]
            self.sparse = self.sparse or self.rule.always_sparse
        window = self.options.feature_sampling_window
        if self.step and self.step % window == 0:
            self.last_frequency = self.firing_frequency
            self.fired_in_window.zero_()
            self.tokens_in_window = 0

    def is_sparse_on(self, n_rows: int) -> bool:
        """Whether a step on so many rows is computed from active entries alone."""
        return self.sparse and not (self.on_gpu and n_rows < SPARSE_ROWS_ON_GPU)

    def numbers_of_step(self, n_rows: int) -> tuple[float, float, float]:
        """For `numbers`."""
        o = self.options
        rates = adam_rates(self.lr, o.adam_beta1, o.adam_beta2, self.step + 1)
        return (self.coefficient / n_rows, *rates)

    def tell_rule(self, n_rows: int) -> None:
        if self.steering is not None:
            self.rule.aim(self.steering.multiplier)
        norms = None if self.unit else torch.linalg.vector_norm(self.sae.W_dec, dim=1)
        per_row = self.numbers[0] if self.on_gpu else self.coefficient / n_rows
        self.rule.begin_step(StepContext(self.coefficient, per_row, norms))

    def finish_step(self, grad: Gradients, n_rows: int) -> None:
        """Counters, then Adam on the gradient of one whole batch.

        Where decoder rows are unit, the gradient's component along them is gone already.
        """
        self.update(grad)
        self.close_step(n_rows, lambda: float(grad.fired.sum()))

    def update(self, grad: Gradients) -> None:
        """Of the step, all that is done on the device."""
        if self.on_gpu:
            grad.fired.mul_(grad.valid)
            self.steps_since_fired += grad.valid
        else:
            self.steps_since_fired += 1
        self.fired_in_window += grad.fired.to(torch.int64)
        self.steps_since_fired.masked_fill_(grad.fired > 0, 0)
        if self.on_gpu:
            self.adam_on_gpu(grad)
        else:
            self.adam_in_torch(grad)

    def close_step(self, n_rows: int, n_active: Callable[[], float]) -> None:
        """And the rest. n_active: of all entries of the batch; asked only where it is needed."""
        self.tokens_in_window += n_rows
        if (self.step + 1) % STEPS_PER_DECISION == 0:
            # Whole numbers, so no order of adding them matters.
            self.active_share = n_active() / (n_rows * self.sae.d_sae)
        self.rule.after_step()
        if self.steering is not None:
            self.rule.steer(self.steering.see(self.step, n_active() / n_rows))
        self.adam.param_groups[0]["lr"] = self.lr  # what the step was made with, for reports
        self.step += 1

    def adam_in_torch(self, grad: Gradients) -> None:
        for name in self.sae.common:
            getattr(self.sae, name).grad = getattr(grad, name)
        for name in self.sae.EXTRA:
            getattr(self.sae, name).grad = self.rule.gradient_of(name, grad)
        if self.options.gradient_clip:
            torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.options.gradient_clip)
        self.adam.param_groups[0]["lr"] = self.lr
        self.adam.step()
        for parameter in self.sae.parameters():
            parameter.grad = None  # the buffers belong to the step, not to the SAE
        if self.unit:
            scale_rows_to_unit_norm(self.sae.W_dec)

    def adam_on_gpu(self, grad: Gradients) -> None:
        """On the moments where torch keeps them, so that a checkpoint is the same."""
        moments = {}
        for name in PARAMETERS:
            parameter = getattr(self.sae, name)
            state = self.adam.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.zeros_like(parameter)
            moments[name] = (state["exp_avg"], state["exp_avg_sq"])
        fused_adam_rows(
            self.sae,
            grad,
            moments,
            self.numbers[1:],
            beta1=self.options.adam_beta1,
            beta2=self.options.adam_beta2,
            unit=self.unit,
            gradient_clip=self.options.gradient_clip,
            half=self.half,
        )

    @property
    def silent(self) -> Tensor:
        """int64 [n]: the features that have not fired in this sampling window."""
        return (self.fired_in_window == 0).nonzero().squeeze(1)

    @property
    def wants_rows(self) -> bool:
        """Whether, after the step just made, dead features are to be given rows (`resample`)."""
        return resampling.is_due(self.options, self.step) and len(self.silent) > 0

    def resample(self, rows: Tensor, weights: Tensor) -> None:
        """Gives features that have not fired in this window a new start.

        rows [n, D]: activations as they are in the stream; weights [n]: what they are drawn by.
        """
        rows = rows.to(self.sae.W_enc) * self.activation_scale
        weights = torch.where(rows.any(dim=1).cpu(), weights.cpu(), 0.0)  # 0 has no direction
        dead = self.silent
        chosen = resampling.choose_rows(weights, len(dead), self.options.seed, self.step)
        if len(chosen) == 0:
            return
        dead = dead[: len(chosen)]
        tensors = self.sae.tensors
        moments = [dict(self.adam.state.get(p, {})) for p in tensors.values()]
        resampling.resample(tensors, moments, dead, rows[chosen.to(rows.device)])
        self.steps_since_fired[dead] = 0
        self.resampled = self.step
        self.n_resampled += len(dead)

    def feature_metrics(self) -> dict[str, float]:
        """Counts over features, keyed as in wandb."""
        frequency = self.firing_frequency
        resamples = self.options.feature_sampling_method is not None
        return {
            "metrics/mean_log10_feature_sparsity": float(log10_frequency(frequency).mean()),
            "sparsity/dead_features": int(self.dead.sum()),
            "sparsity/below_dead_feature_threshold": int(
                (frequency < self.options.dead_feature_threshold).sum()
            ),
            "sparsity/mean_passes_since_fired": float(self.steps_since_fired.cpu().double().mean()),
            "sparsity/below_1e-5": int((frequency < 1e-5).sum()),
            "sparsity/below_1e-6": int((frequency < 1e-6).sum()),
            **({"sparsity/resampled": self.n_resampled} if resamples else {}),
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything but the weights: tensors and plain numbers."""
        tensors = {
            "steps_since_fired": self.steps_since_fired,
            "fired_in_window": self.fired_in_window,
            "last_frequency": self.last_frequency,
        }
        for name, parameter in self.sae.tensors.items():
            moments = self.adam.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in moments:
                    tensors[f"adam.{name}.{key}"] = moments[key]
        return tensors, {
            "step": self.step,
            "tokens_in_window": self.tokens_in_window,
            "activation_scale": self.activation_scale,
            **({"output_scale": self.output_scale} if self.sae.is_transcoder else {}),
            "sparse": self.sparse,
            "active_share": self.active_share,
            "resampled": self.resampled,
            "n_resampled": self.n_resampled,
            **({"rule": state} if (state := self.rule.state()) else {}),
            **({"steering": self.steering.state()} if self.steering is not None else {}),
        }

    @classmethod
    def resumed(
        cls,
        sae: SAE,
        options: TrainingOptions,
        tensors: dict[str, Tensor],
        numbers: dict[str, Any],
    ) -> SAETrainer:
        """The trainer whose `state()` this is, with the weights `sae` of the same moment.

        The weights are taken as they are: scaling rows that already have norm 1 once more could
        change their last bits, and a resumed run would no longer be the uninterrupted one.
        """
        weights = sae.W_dec.clone()
        scales = (float(numbers.get(n, 1.0)) for n in ("activation_scale", "output_scale"))
        self = cls(sae, options, *scales)
        sae.W_dec.copy_(weights)
        self.step = int(numbers["step"])
        self.tokens_in_window = int(numbers["tokens_in_window"])
        self.sparse = bool(numbers.get("sparse", False))
        self.active_share = float(numbers.get("active_share", 1.0))
        for name in ("steps_since_fired", "fired_in_window", "last_frequency"):
            getattr(self, name).copy_(tensors[name])
        self.resampled = numbers.get("resampled")
        self.n_resampled = numbers.get("n_resampled", 0)
        self.rule.restore(numbers.get("rule", {}))
        if self.steering is not None:
            self.steering.restore(numbers.get("steering", {}))
        for name, parameter in sae.tensors.items():
            if f"adam.{name}.exp_avg" not in tensors:
                continue
            moments = {  # in the parameter's layout: Adam walks them side by side in memory
                key: torch.empty_like(parameter).copy_(tensors[f"adam.{name}.{key}"])
                for key in ("exp_avg", "exp_avg_sq")
            }
            step = torch.tensor(float(self.step))
            if self.adam.defaults["fused"]:  # otherwise Adam keeps it on the CPU
                step = step.to(parameter.device)
            self.adam.state[parameter] = {"step": step, **moments}
        return self
