"""From a config to what a training step depends on."""

from __future__ import annotations

from typing import TypeVar

import torch

from saeray.sae.options import TrainingOptions
from saeray.spec.architectures import OWN_FIELDS, widths_of
from saeray.spec.config import LanguageModelSAERunnerConfig


def options_of(
    config: LanguageModelSAERunnerConfig, device: torch.device, d_in: int
) -> TrainingOptions:
    """The part of a config that a training step depends on, on this device."""
    own = {
        name: value
        for name in OWN_FIELDS[config.architecture]
        if (value := getattr(config, name)) is not None
    }
    if config.architecture == "matryoshka":
        own["matryoshka_widths"] = widths_of(config.matryoshka_widths, config.d_sae(d_in))
    return TrainingOptions(
        lr=float(config.lr),  # a number by now
        total_steps=config.steps,
        lr_scheduler_name=filled(config.lr_scheduler_name),
        lr_warm_up_steps=filled(config.lr_warm_up_steps),
        lr_end=config.lr_end,
        num_cycles=config.num_cycles,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        mse_normalization=filled(config.mse_normalization),
        decoder_norm=filled(config.decoder_norm),
        l1_warm_up_steps=filled(config.l1_warm_up_steps),
        lr_decay_steps=filled(config.lr_decay_steps),
        gradient_clip=filled(config.gradient_clip),
        compute_dtype=config.computes_in(device.type),
        feature_sampling_window=config.feature_sampling_window,
        dead_feature_window=filled(config.dead_feature_window),
        dead_feature_threshold=config.dead_feature_threshold,
        architecture=config.architecture,
        seed=config.seed,
        **own,
    )


T = TypeVar("T")


def filled(value: T | None) -> T:
    """A field that the config's recipe has filled where nobody gave it."""
    assert value is not None
    return value
