"""Measures of an SAE on a batch, and of its features over time.  B rows, D d_in, L d_sae."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOG_FREQUENCY_FLOOR = 1e-10  # features that never fire stand at 10^-10 in log plots


class Reconstruction(NamedTuple):
    """How well x̂ stands for x: 0-d tensors."""

    explained_variance: Tensor  # mean over rows of 1 - ‖x - x̂‖² / ‖x - mean‖²
    explained_variance_std: Tensor  # its standard deviation over rows
    l2_norm: Tensor  # mean ‖x̂‖
    l2_ratio: Tensor  # mean ‖x̂‖ / ‖x‖


def reconstruction(x: Tensor, error: Tensor, mean: Tensor | None = None) -> Reconstruction:
    """x [B, D], error = x̂ - x [B, D]; `mean` [D] defaults to the mean of the batch."""
    mean = x.mean(dim=0) if mean is None else mean
    variance = (x - mean).square().sum(dim=1).clamp_min(1e-12)
    explained = 1 - error.square().sum(dim=1) / variance
    norm_out = torch.linalg.vector_norm(x + error, dim=1)
    norm_in = torch.linalg.vector_norm(x, dim=1).clamp_min(1e-12)
    return Reconstruction(
        explained.mean(),
        explained.std() if len(x) > 1 else torch.zeros_like(explained.mean()),
        norm_out.mean(),
        (norm_out / norm_in).mean(),
    )


def log10_frequency(frequency: Tensor) -> Tensor:
    """log10(frequency + 1e-10) of the firing frequencies [L], which are on the CPU."""
    return torch.log10(frequency.double() + LOG_FREQUENCY_FLOOR).float()


def density_histogram(frequency: Tensor, bins: int = 50) -> tuple[list[int], list[float]]:
    """Counts and edges of the histogram of log10 firing frequency, from -10 to 0."""
    counts, edges = torch.histogram(log10_frequency(frequency).cpu(), bins=bins, range=(-10.0, 0.0))
    return [int(c) for c in counts], [float(e) for e in edges]
