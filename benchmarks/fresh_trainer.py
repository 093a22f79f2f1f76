"""A trainer as a sweep would make it of a config, without a sweep."""

from __future__ import annotations

import torch

from saeray.cluster.options import options_of
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.initial import initial_sae
from saeray.sae.trainer import SAETrainer
from saeray.spec.config import LanguageModelSAERunnerConfig


def fresh_trainer(
    config: LanguageModelSAERunnerConfig, d_in: int, device: torch.device | str = "cpu"
) -> SAETrainer:
    """config: resolved, of an SAE, no transcoder; b_dec starts at 0."""
    device = torch.device(device)
    options = options_of(config, device, d_in)
    sae = initial_sae(
        d_in,
        config.d_sae(d_in),
        seed=config.seed,
        b_dec=torch.zeros(d_in),
        dtype=torch.float32,
        encoder_init=config.encoder_init or "",
        encoder_init_scale=config.encoder_init_scale or 0.0,
        decoder_init_norm=config.decoder_init_norm or 0.0,
        architecture=ARCHITECTURES[config.architecture],
        options=options,
    )
    return SAETrainer(sae.to(device), options)
