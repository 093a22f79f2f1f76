"""What an SAE of a pack starts from: fresh weights or trained ones, and at which scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saeray.actors import waiting
from saeray.cluster.options import filled
from saeray.files.init_from import started_from
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.architectures.base import SAE
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.trainer import SAETrainer
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import PackPlan


def started(
    config: LanguageModelSAERunnerConfig,
    options: TrainingOptions,
    plan: PackPlan,
    device: torch.device,
    limit_s: float,
) -> SAETrainer:
    """A new SAE before its first step."""
    start = Start(config, plan, limit_s)
    scale, of_output = (start.scale_at(hook) for hook in (start.read, start.written))
    sae = start.sae(options, scale, of_output)
    return SAETrainer(sae.to(device), options, scale, of_output)


class Start:
    """Of one SAE; figures of activations are the stream's buffer's."""

    def __init__(
        self, config: LanguageModelSAERunnerConfig, plan: PackPlan, limit_s: float
    ) -> None:
        self.config, self.plan, self.limit = config, plan, limit_s
        self.read, self.written = config.hooks_read[0], config.hooks_read[-1]

    def sae(self, options: TrainingOptions, scale: float, of_output: float) -> SAE:
        """On activations that are multiplied by scale; what it makes of them, by of_output."""
        c, d_in = self.config, self.plan.widths[self.read]
        if c.init_from is not None:
            d_out = self.plan.widths[self.written]
            return started_from(c, d_in, options, scale, d_out=d_out, of_output=of_output)
        is_transcoder = c.hook_point_out is not None
        return initial_sae(
            d_in,
            c.d_sae(d_in),
            seed=c.seed,
            b_dec=self.middle_of(self.read) * scale,
            b_dec_out=self.middle_of(self.written) * of_output if is_transcoder else None,
            skip=c.skip_connection,
            dtype=getattr(torch, c.dtype),
            encoder_init=filled(c.encoder_init),
            encoder_init_scale=filled(c.encoder_init_scale),
            decoder_init_norm=filled(c.decoder_init_norm),
            architecture=ARCHITECTURES[c.architecture],
            options=options,
        )

    def middle_of(self, hook_point: str) -> Tensor:
        """What b_dec starts from, and at hook_point_out b_dec_out."""
        if self.config.b_dec_init_method == "zeros":
            return torch.zeros(self.plan.widths[hook_point])
        return self.statistic(hook_point, filled(self.config.b_dec_init_method))

    def scale_at(self, hook_point: str) -> float:
        """What activations are multiplied by: 1, or for a mean norm of the root of their width."""
        if self.config.normalize_activations == "none":
            return 1.0
        mean = self.statistic(hook_point, "mean_norm")
        return float(math.sqrt(self.plan.widths[hook_point]) / mean)

    def statistic(self, hook_point: str, name: str) -> Tensor:
        """Of a sample of the first half buffer; float32."""
        c = self.config
        array = waiting.poll(
            lambda: self.plan.buffer.statistic.remote(
                hook_point, name, c.b_dec_init_rows, c.data_seed
            ),
            self.limit,
            "activation buffer",
        )
        return torch.from_numpy(array.copy())
