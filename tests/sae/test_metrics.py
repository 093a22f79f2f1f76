"""Explained variance by its two definitions, of a batch and of many batches one after the other."""

import math

import pytest
import torch

from saeray.sae.metrics import ReconstructionSums, reconstruction


def test_explained_variance_is_a_ratio_of_sums_and_per_token_a_mean_of_ratios():
    x = torch.tensor([[8.0], [0.0], [5.0], [3.0]])  # mean 4; ‖x - mean‖² = 16, 16, 1, 1
    error = torch.tensor([[2.0], [2.0], [1.0], [1.0]])  # squares 4, 4, 1, 1
    quality = reconstruction(x, error)
    assert float(quality.explained_variance) == pytest.approx(1 - 10 / 34)
    each = [1 - 4 / 16, 1 - 4 / 16, 0.0, 0.0]
    assert float(quality.explained_variance_per_token) == pytest.approx(sum(each) / 4)
    # Around 0.375: four squares of 0.375², over 3.
    assert float(quality.explained_variance_per_token_std) == pytest.approx(
        (4 * 0.375**2 / 3) ** 0.5
    )
    assert quality.metrics()["metrics/explained_variance"] == pytest.approx(1 - 10 / 34)


def reference(x, error):
    """All rows at once, in float64, by PyTorch."""
    x, error = x.double(), error.double()
    mean = x.mean(0)
    variance = (x - mean).square().sum(1)
    explained = 1 - error.square().sum(1) / variance
    norm = (x + error).norm(dim=1)
    ratio = norm / x.norm(dim=1)
    total = 1 - error.square().sum() / variance.sum()
    return [float(v) for v in (total, explained.mean(), explained.std(), norm.mean(), ratio.mean())]


@pytest.mark.parametrize(("offset", "noise"), [(0.0, 0.5), (100.0, 0.5), (3.0, 1e-3)])
def test_sums_over_batches_are_the_figures_of_all_rows(offset, noise):
    """Batches of different sizes, far from the origin, and nearly equal rows, too."""
    generator = torch.Generator().manual_seed(0)
    x = offset + torch.randn(1000, 24, generator=generator)
    error = noise * torch.randn(1000, 24, generator=generator)
    sums = ReconstructionSums(x.double().mean(0).float())
    for part in zip(x.split([1, 700, 7, 292]), error.split([1, 700, 7, 292]), strict=True):
        sums.add(*part)
    assert list(sums.result()) == pytest.approx(reference(x, error), rel=1e-6, abs=1e-6)


def test_a_std_much_smaller_than_its_mean_keeps_its_digits():
    x = torch.tensor([[1.0], [-1.0]]).repeat(500, 1)  # ‖x - mean‖² = 1 for all
    explained = 0.5 + 1e-6 * (torch.arange(1000) % 5).double()
    error = (1 - explained).sqrt().unsqueeze(1).float()
    sums = ReconstructionSums(torch.zeros(1))
    for part in zip(x.split(100), error.split(100), strict=True):
        sums.add(*part)
    wanted = (1 - error.square().double().squeeze(1)).std()
    assert sums.result().explained_variance_per_token_std == pytest.approx(float(wanted), rel=2e-2)


def test_rows_that_are_all_equal_have_no_variance_to_explain():
    sums = ReconstructionSums(torch.ones(3))
    sums.add(torch.ones(4, 3), torch.zeros(4, 3))
    assert sums.result().explained_variance is None
    sums.add(torch.full((1, 3), torch.nan), torch.zeros(1, 3))
    assert math.isnan(sums.result().explained_variance)  # which is another matter
    assert not reconstruction(torch.ones(4, 3), torch.ones(4, 3)).explained_variance.isfinite()
