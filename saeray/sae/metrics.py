"""Measures of an SAE on a batch or on many, and of its features.  B rows, D d_in, L d_sae.

What each is, with its unit and whose name it has: docs/metrics.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOG_FREQUENCY_FLOOR = 1e-10  # features that never fire stand at 10^-10 in log plots
DENSE = 0.1  # share of tokens above which a feature that fires on them is called dense
VALUE_BINS = 64  # between 0 and a feature's largest value, for `DescriptionLength`
NEIGHBOURS_AT_ONCE = 1 << 24  # cosines: 64 MB in float32
SMALLEST_NORM = 1e-12


class Reconstruction(NamedTuple):
    """How well x̂ stands for x: 0-d tensors, or floats."""

    explained_variance: Any  # 1 - Σ‖x - x̂‖² / Σ‖x - mean‖², both summed over rows
    explained_variance_per_token: Any  # mean over rows of 1 - ‖x - x̂‖² / ‖x - mean‖²
    explained_variance_per_token_std: Any  # its standard deviation over rows
    l2_norm: Any  # mean ‖x̂‖
    l2_ratio: Any  # mean ‖x̂‖ / ‖x‖
    fvu: Any  # 1 - explained_variance
    cosine: Any  # mean ⟨x, x̂⟩ / ‖x‖ ‖x̂‖
    relative_reconstruction_bias: Any  # Σ‖x̂‖² / Σ⟨x, x̂⟩, both summed over rows

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
    inner: Tensor  # ⟨x, x̂⟩
    cosine: Tensor  # inner / ‖x‖ ‖x̂‖


def row_figures(x: Tensor, error: Tensor, mean: Tensor) -> RowFigures:
    """x [B, D], error = x̂ - x [B, D], mean [D]."""
    squared = error.square().sum(dim=1)
    variance = (x - mean).square().sum(dim=1)
    x_hat = x + error
    norm = torch.linalg.vector_norm(x_hat, dim=1)
    norm_in = torch.linalg.vector_norm(x, dim=1).clamp_min(SMALLEST_NORM)
    inner = torch.linalg.vecdot(x, x_hat)
    return RowFigures(
        squared,
        variance,
        1 - squared / variance.clamp_min(1e-12),
        norm,
        norm / norm_in,
        inner,
        inner / norm_in / norm.clamp_min(SMALLEST_NORM),
    )


def reconstruction(x: Tensor, error: Tensor) -> Reconstruction:
    """Of one batch, around its own mean: x [B, D], error = x̂ - x [B, D]; 0-d tensors.

    Rows that are all equal have no variance to explain: then explained_variance is not finite. Nor
    is relative_reconstruction_bias where all of x̂ is zero.
    """
    rows = row_figures(x, error, x.mean(dim=0))
    unexplained = rows.error.sum() / rows.variance.sum()
    return Reconstruction(
        explained_variance=1 - unexplained,
        explained_variance_per_token=rows.explained.mean(),
        explained_variance_per_token_std=(
            rows.explained.std() if len(x) > 1 else torch.zeros_like(rows.explained[0])
        ),
        l2_norm=rows.norm.mean(),
        l2_ratio=rows.ratio.mean(),
        fvu=unexplained,
        cosine=rows.cosine.mean(),
        relative_reconstruction_bias=rows.norm.square().sum() / rows.inner.sum(),
    )


class ReconstructionSums:
    """`Reconstruction` of any number of batches, around a mean that is known: a few sums."""

    def __init__(self, mean: Tensor) -> None:
        """mean [D] of all rows of all batches, on their device."""
        self.mean = mean
        self.n_rows = 0
        self.error = self.variance = self.norm = self.ratio = 0.0
        self.squared_norm = self.inner = self.cosine = 0.0
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
        self.squared_norm += float(rows.norm.square().sum())
        self.ratio += float(rows.ratio.sum())
        self.inner += float(rows.inner.sum())
        self.cosine += float(rows.cosine.sum())
        # Two parts' means and deviations in one (Chan, Golub and LeVeque 1979).
        mean = rows.explained.mean()
        apart = float(mean) - self.explained
        both = self.n_rows + n
        self.deviations += float((rows.explained - mean).square().sum())
        self.deviations += apart**2 * self.n_rows * n / both
        self.explained += apart * n / both
        self.n_rows = both

    def result(self) -> Reconstruction:
        """Floats; None where there is nothing to divide by: no variance, or only zeros for x̂."""
        n = self.n_rows
        unexplained = None if self.variance == 0 else self.error / self.variance
        return Reconstruction(
            explained_variance=None if unexplained is None else 1 - unexplained,
            explained_variance_per_token=self.explained,
            explained_variance_per_token_std=(
                math.sqrt(self.deviations / (n - 1)) if n > 1 else 0.0
            ),
            l2_norm=self.norm / n,
            l2_ratio=self.ratio / n,
            fvu=unexplained,
            cosine=self.cosine / n,
            relative_reconstruction_bias=(
                None if self.inner == 0 else self.squared_norm / self.inner
            ),
        )


# --- features -----------------------------------------------------------------------------------


class FeatureSums:
    """What every feature did over any number of batches: three numbers of each."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.n_rows = 0
        self.fired = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.largest = torch.zeros(d_sae, device=device)
        self.total = torch.zeros(d_sae, dtype=torch.float64)  # on the CPU, as not all have float64

    def add(self, f: Tensor) -> None:
        """f [B, L], none of it negative."""
        self.n_rows += len(f)
        self.fired.add_((f > 0).sum(dim=0))
        self.largest.copy_(torch.maximum(self.largest, f.amax(dim=0).float()))
        self.total.add_(f.sum(dim=0).cpu().double())

    @property
    def frequency(self) -> Tensor:
        """Share of the rows on which each fired: float64 [L] on the CPU."""
        return self.fired.cpu().double() / self.n_rows

    @property
    def mean_when_active(self) -> Tensor:
        """Of each feature's values above zero: float64 [L] on the CPU; NaN where there are none."""
        return self.total / self.fired.cpu().double()

    def metrics(self) -> dict[str, float]:
        """By their wandb keys."""
        frequency = self.frequency
        return {
            "metrics/l0": int(self.fired.sum()) / self.n_rows,
            "metrics/l1": float(self.total.sum()) / self.n_rows,
            "metrics/mean_log10_feature_sparsity": float(log10_frequency(frequency).mean()),
            "metrics/dense_share": float((frequency > DENSE).double().mean()),
            "eval/features_never_fired": int((self.fired == 0).sum()),
        }


class DescriptionLength:
    """Bits that the features of one row take: which of them fire, and their values.

    Σ_j H₂(p_j) + p_j H(v_j): p_j the share of rows on which feature j fires, H₂ the entropy of
    that yes or no, v_j its values above zero in `VALUE_BINS` bins of equal width from 0 to the
    largest of them (Ayonrinde, Pearce and Sharkey 2024, arXiv 2410.11179).
    """

    def __init__(self, sums: FeatureSums) -> None:
        """sums: of all the rows that will be added; the bins are made of them."""
        self.sums = sums
        self.scale = VALUE_BINS / sums.largest.clamp_min(SMALLEST_NORM)
        self.counts = torch.zeros(
            len(sums.largest) * VALUE_BINS, dtype=torch.int32, device=sums.largest.device
        )

    def add(self, f: Tensor) -> None:
        """f [B, L]."""
        active = (f > 0).nonzero()
        feature = active[:, 1]
        value = f[active[:, 0], feature].float()
        into = (value * self.scale[feature]).long().clamp_max(VALUE_BINS - 1)
        self.counts.scatter_add_(
            0, feature * VALUE_BINS + into, torch.ones_like(into, dtype=torch.int32)
        )

    def bits(self) -> float:
        """Per row."""
        p = self.sums.frequency
        counts = self.counts.cpu().view(len(p), VALUE_BINS).double()
        shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
        values = torch.special.entr(shares).sum(dim=1)
        fires = torch.special.entr(p) + torch.special.entr(1 - p)
        return float((fires + p * values).sum()) / math.log(2)


def nth_decoder_projection(x: Tensor, W_dec: Tensor, b_dec: Tensor, n: int) -> float:
    """Of the B · L values of (x - b_dec) Uᵀ the one with n · B larger ones, in x's unit.

    x [B, D]; U is W_dec [L, D] with rows of norm 1. It is smallest at the right L0, if n is above
    that (Chanin and Garriga-Alonso 2025, arXiv 2508.16560). Takes B · L numbers of memory, twice.
    """
    projected = (W_dec @ (x - b_dec).t()).div_(row_norms(W_dec).unsqueeze(1))
    larger = min(n * len(x), projected.numel() - 1)
    return float(projected.flatten().kthvalue(projected.numel() - larger).values)


class Neighbours(NamedTuple):
    """Of each feature the other one whose decoder row points most the same way: [L], on the CPU."""

    nearest: Tensor  # int64; -1 where there is no other one
    cosine: Tensor  # between the two rows


def decoder_neighbours(W_dec: Tensor, at_once: int = NEIGHBOURS_AT_ONCE) -> Neighbours:
    """W_dec [L, D]. L² · D multiplications; `at_once` of the L² cosines are held at a time."""
    L, norms = len(W_dec), row_norms(W_dec)
    if L == 1:
        return Neighbours(torch.tensor([-1]), torch.tensor([math.nan]))
    parts = []
    for rows in torch.arange(L, device=W_dec.device).split(max(1, at_once // L)):
        cosines = (W_dec @ W_dec[rows].t()).div_(norms.unsqueeze(1)).div_(norms[rows])  # [L, …]
        cosines.scatter_(0, rows.unsqueeze(0), -2.0)  # not itself
        found = cosines.max(dim=0)
        parts.append((found.indices.cpu(), found.values.float().cpu()))
    return Neighbours(torch.cat([i for i, _ in parts]), torch.cat([c for _, c in parts]))


def feature_table(features: FeatureSums, W_dec: Tensor) -> dict[str, Tensor]:
    """What there is to know of each feature, by column: [L] on the CPU (docs/metrics.md)."""
    neighbours = decoder_neighbours(W_dec)
    frequency = features.frequency
    return {
        "density": frequency,
        "max_activation": features.largest.cpu(),
        "mean_activation_when_active": features.mean_when_active.float(),
        "dead_on_held_out": frequency == 0,
        "dense": frequency > DENSE,
        "nearest_feature": neighbours.nearest,
        "nearest_cosine": neighbours.cosine,
        "decoder_norm": torch.linalg.vector_norm(W_dec, dim=1).float().cpu(),
    }


def row_norms(W_dec: Tensor) -> Tensor:
    """Norms [L] of the rows of W_dec [L, D], none of them so small that it can't be divided by."""
    return torch.linalg.vector_norm(W_dec, dim=1).clamp_min(SMALLEST_NORM)


def log10_frequency(frequency: Tensor) -> Tensor:
    """log10(frequency + 1e-10) of the firing frequencies [L], which are on the CPU."""
    return torch.log10(frequency.double() + LOG_FREQUENCY_FLOOR).float()


def density_histogram(frequency: Tensor, bins: int = 50) -> tuple[list[int], list[float]]:
    """Counts and edges of the histogram of log10 firing frequency, from -10 to 0."""
    # Those that always fire are above 0 by the floor, and would be in no bin.
    logs = log10_frequency(frequency).cpu().clamp_max(0.0)
    counts, edges = torch.histogram(logs, bins=bins, range=(-10.0, 0.0))
    return [int(c) for c in counts], [float(e) for e in edges]
