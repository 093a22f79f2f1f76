"""Measures of an SAE on a batch, and of its features over time.  B rows, D d_in, L d_sae."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG_FREQUENCY_FLOOR = 1e-10  # features that never fire stand at 10^-10 in log plots


class Reconstruction(NamedTuple):
    """How well x̂ stands for x: 0-d tensors, or floats."""

    explained_variance: Any  # 1 - Σ‖x - x̂‖² / Σ‖x - mean‖², both summed over rows
    explained_variance_per_token: Any  # mean over rows of 1 - ‖x - x̂‖² / ‖x - mean‖²
    explained_variance_per_token_std: Any  # its standard deviation over rows
    l2_norm: Any  # mean ‖x̂‖
    l2_ratio: Any  # mean ‖x̂‖ / ‖x‖

    def metrics(self) -> dict[str, float | None]:
        """By their wandb keys."""
        return {
            f"metrics/{name}": None if value is None else float(value)
            for name, value in self._asdict().items()
        }


class RowFigures(NamedTuple):
    """What `Reconstruction` is made of, of each row: [B]."""

    error: Tensor  # ‖x - x̂‖²
    variance: Tensor  # ‖x - mean‖²
    explained: Tensor  # 1 - error / variance
    norm: Tensor  # ‖x̂‖
    ratio: Tensor  # ‖x̂‖ / ‖x‖


def row_figures(x: Tensor, error: Tensor, mean: Tensor) -> RowFigures:
    """x [B, D], error = x̂ - x [B, D], mean [D]."""
    squared = error.square().sum(dim=1)
    variance = (x - mean).square().sum(dim=1)
    norm = torch.linalg.vector_norm(x + error, dim=1)
    ratio = norm / torch.linalg.vector_norm(x, dim=1).clamp_min(1e-12)
    return RowFigures(squared, variance, 1 - squared / variance.clamp_min(1e-12), norm, ratio)


def reconstruction(x: Tensor, error: Tensor) -> Reconstruction:
    """Of one batch, around its own mean: x [B, D], error = x̂ - x [B, D]; 0-d tensors.

    Rows that are all equal have no variance to explain: then explained_variance is not finite.
    """
    rows = row_figures(x, error, x.mean(dim=0))
    return Reconstruction(
        1 - rows.error.sum() / rows.variance.sum(),
        rows.explained.mean(),
        rows.explained.std() if len(x) > 1 else torch.zeros_like(rows.explained[0]),
        rows.norm.mean(),
        rows.ratio.mean(),
    )


class ReconstructionSums:
    """`Reconstruction` of any number of batches, around a mean that is known: a few sums."""

    def __init__(self, mean: Tensor) -> None:
        """mean [D] of all rows of all batches, on their device."""
        self.mean = mean
        self.n_rows = 0
        self.error = self.variance = self.norm = self.ratio = 0.0
        # Of the rows' `explained`: its mean, and its squared deviations from that. Summing squares
        # and subtracting the mean's in the end would lose every digit where rows are nearly equal.
        self.explained = self.deviations = 0.0

    def add(self, x: Tensor, error: Tensor) -> None:
        """x [B, D], error = x̂ - x [B, D]."""
        # Added up on the CPU: not every device has float64.
        rows = RowFigures(*(t.cpu().double() for t in row_figures(x, error, self.mean)))
        n = len(rows.error)
        self.error += float(rows.error.sum())
        self.variance += float(rows.variance.sum())
        self.norm += float(rows.norm.sum())
        self.ratio += float(rows.ratio.sum())
        # Two parts' means and deviations in one (Chan, Golub and LeVeque 1979).
        mean = rows.explained.mean()
        apart = float(mean) - self.explained
        both = self.n_rows + n
        self.deviations += float((rows.explained - mean).square().sum())
        self.deviations += apart**2 * self.n_rows * n / both
        self.explained += apart * n / both
        self.n_rows = both

    def result(self) -> Reconstruction:
        """Floats; explained_variance is None where there is no variance to explain."""
        n = self.n_rows
        return Reconstruction(
            None if self.variance == 0 else 1 - self.error / self.variance,
            self.explained,
            math.sqrt(self.deviations / (n - 1)) if n > 1 else 0.0,
            self.norm / n,
            self.ratio / n,
        )


def log10_frequency(frequency: Tensor) -> Tensor:
    """log10(frequency + 1e-10) of the firing frequencies [L], which are on the CPU."""
    return torch.log10(frequency.double() + LOG_FREQUENCY_FLOOR).float()


def density_histogram(frequency: Tensor, bins: int = 50) -> tuple[list[int], list[float]]:
    """Counts and edges of the histogram of log10 firing frequency, from -10 to 0."""
    counts, edges = torch.histogram(log10_frequency(frequency).cpu(), bins=bins, range=(-10.0, 0.0))
    return [int(c) for c in counts], [float(e) for e in edges]
