"""What a pack's first step would load and make, loaded and made while it has nothing else to do."""

from __future__ import annotations

import torch

from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer


def warm_up() -> None:
    """Steps an SAE of no consequence once: PyTorch imports a second's worth for its first step."""
    sae = initial_sae(4, 8, seed=0, b_dec=torch.zeros(4), dtype=torch.float32)
    options = TrainingOptions(lr=1e-3, l1_coefficient=1e-3, total_steps=1)
    PackStep().step([SAETrainer(sae, options)], torch.zeros(8, 4))
