"""Measures of a batch and of many, each by hand or against all rows at once in float64."""

import math

import numpy as np
import pytest
import torch

from saeray.sae.metrics import (
    VALUE_BINS,
    DescriptionLength,
    FeatureSums,
    ReconstructionSums,
    decoder_neighbours,
    density_histogram,
    feature_table,
    nth_decoder_projection,
    reconstruction,
)


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
    assert quality.metrics()["metrics/fvu"] == pytest.approx(10 / 34)


def test_lengths_and_angles_of_reconstructions():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])  # norms 5, 2
    x_hat = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # norms 3, 1; ⟨x, x̂⟩ = 9, 2
    sums = ReconstructionSums(x.mean(dim=0))
    sums.add(x, x_hat - x)
    for quality in (reconstruction(x, x_hat - x), sums.result()):
        assert float(quality.l2_norm) == pytest.approx((3 + 1) / 2)
        assert float(quality.l2_ratio) == pytest.approx((3 / 5 + 1 / 2) / 2)
        assert float(quality.cosine) == pytest.approx((9 / (5 * 3) + 2 / (2 * 1)) / 2)
        # Not the mean of the rows' 9/9 and 1/2: sums over rows, and then their ratio.
        assert float(quality.relative_reconstruction_bias) == pytest.approx((9 + 1) / (9 + 2))


def test_reconstructions_of_zeros_have_no_direction():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    sums = ReconstructionSums(x.mean(dim=0))
    sums.add(x, -x)
    assert sums.result().cosine == sums.result().l2_ratio == 0.0
    assert sums.result().relative_reconstruction_bias is None
    assert not reconstruction(x, -x).relative_reconstruction_bias.isfinite()


def reference(x, error):
    """All rows at once, in float64, by PyTorch."""
    x, error = x.double(), error.double()
    mean = x.mean(0)
    variance = (x - mean).square().sum(1)
    explained = 1 - error.square().sum(1) / variance
    norm = (x + error).norm(dim=1)
    ratio = norm / x.norm(dim=1)
    fvu = error.square().sum() / variance.sum()
    inner = (x * (x + error)).sum(1)
    cosine = (inner / norm / x.norm(dim=1)).mean()
    bias = norm.square().sum() / inner.sum()
    figures = (1 - fvu, explained.mean(), explained.std(), norm.mean(), ratio.mean(), fvu)
    return [float(v) for v in (*figures, cosine, bias)]


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


def sums_of(f, *sizes):
    sums = FeatureSums(f.shape[1], f.device)
    for part in f.split(sizes or len(f)):
        sums.add(part)
    return sums


def test_what_features_do_over_batches():
    f = torch.zeros(20, 4)
    f[:, 0] = 2.0  # on all 20 rows
    f[:3, 1] = torch.tensor([1.0, 5.0, 3.0])  # on 3 of 20: dense as well
    f[7, 2] = 4.0  # on 1 of 20; the last one never fires
    sums = sums_of(f, 2, 11, 7)
    found = sums.metrics()
    assert found["metrics/l0"] == pytest.approx((20 + 3 + 1) / 20)
    assert found["metrics/l1"] == pytest.approx((40 + 9 + 4) / 20)
    assert found["metrics/dense_share"] == 2 / 4
    assert found["eval/features_never_fired"] == 1
    logs = [math.log10(p + 1e-10) for p in (1.0, 0.15, 0.05, 0.0)]
    assert found["metrics/mean_log10_feature_sparsity"] == pytest.approx(sum(logs) / 4)
    counts, edges = density_histogram(sums.frequency)
    assert len(edges) == len(counts) + 1 == 51
    # Bins of a fifth of a decade: 1.0 in the last one, 0.15 and 0.05 in those from -1 and -1.4.
    assert [i for i, n in enumerate(counts) if n] == [0, 43, 45, 49]


def test_the_table_of_features():
    f = torch.zeros(20, 3)
    f[:, 0] = 2.0
    f[:2, 1] = torch.tensor([1.0, 4.0])
    table = feature_table(sums_of(f), torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]]))
    assert table["density"].tolist() == [1.0, 0.1, 0.0]
    assert table["max_activation"].tolist() == [2.0, 4.0, 0.0]
    assert table["mean_activation_when_active"].tolist()[:2] == [2.0, 2.5]
    assert table["mean_activation_when_active"][2].isnan()
    assert table["dead_on_held_out"].tolist() == [False, False, True]
    assert table["dense"].tolist() == [True, False, False]  # 0.1 is not above 0.1
    assert table["decoder_norm"].tolist() == [5.0, 1.0, 2.0]
    # Cosines: 4/5 between the first two, 3/5 between first and last, 0 between the others.
    assert table["nearest_feature"].tolist() == [1, 0, 0]
    assert table["nearest_cosine"].tolist() == pytest.approx([0.8, 0.8, 0.6])


@pytest.mark.parametrize("at_once", [1, 700, 1 << 24])
def test_nearest_neighbours_in_blocks_are_those_of_all_pairs(at_once):
    W_dec = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) * 3
    U = W_dec.double() / W_dec.double().norm(dim=1, keepdim=True)
    cosines = (U @ U.t()).fill_diagonal_(-2.0)
    found = decoder_neighbours(W_dec, at_once)
    assert torch.equal(found.nearest, cosines.argmax(dim=1))
    torch.testing.assert_close(found.cosine.double(), cosines.amax(dim=1), rtol=0, atol=1e-6)


def test_one_feature_alone_has_no_neighbour():
    found = decoder_neighbours(torch.ones(1, 4))
    assert found.nearest.tolist() == [-1]
    assert found.cosine.isnan().all()


def bits_of(f, *sizes):
    length = DescriptionLength(sums_of(f))
    for part in f.split(sizes or len(f)):
        length.add(part)
    return length.bits()


def test_description_length_by_hand():
    f = torch.zeros(4, 3)
    f[0, 0], f[2, 0] = 1.0, 10.0  # half of the rows: 1 bit; two values apart: 1 bit on half of them
    f[:, 1] = 3.0  # always, and always the same: 0 bits
    assert bits_of(f) == pytest.approx(1 + 0.5 * 1 + 0)
    f[0, 0] = 9.99  # in one bin with 10: nothing is left to say of the value
    assert bits_of(f) == pytest.approx(1.0)
    f[3, 2] = 0.1  # p = 1/4: H₂ = 1/4 · 2 + 3/4 · log₂ 4/3
    assert bits_of(f) == pytest.approx(1 + 0.5 + 0.75 * math.log2(4 / 3))


def test_description_length_of_batches_is_that_of_numpys_histograms():
    generator = torch.Generator().manual_seed(0)
    f = torch.relu(torch.randn(500, 12, generator=generator) - torch.linspace(-1, 4, 12))
    bits = 0.0
    for column in f.double().numpy().T:
        p = (column > 0).mean()
        if p == 0:
            continue
        values = column[column > 0].astype(np.float32)
        counts = np.histogram(values, bins=VALUE_BINS, range=(0, values.max()))[0]
        shares = counts[counts > 0] / counts.sum()
        bits -= p * np.log2(p) + (1 - p) * np.log2(1 - p) + p * (shares * np.log2(shares)).sum()
    assert bits_of(f, 1, 300, 199) == pytest.approx(bits, rel=1e-6)


def test_nth_decoder_projection_is_the_value_with_n_larger_ones_per_row():
    x = torch.tensor([[2.0, 1.0], [4.0, 3.0]])
    b_dec = torch.tensor([1.0, 1.0])  # x - b_dec: [1, 0], [3, 2]
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]])  # rows of norm 1: e₁, e₂, -e₁
    # Projections 1, 0, -1 and 3, 2, -3; in order 3, 2, 1, 0, -1, -3.
    found = [nth_decoder_projection(x, W_dec, b_dec, n) for n in (0, 1, 2, 9)]
    assert found == [3.0, 1.0, -1.0, -3.0]


def test_nth_decoder_projection_is_that_of_a_sort_in_float64():
    generator = torch.Generator().manual_seed(0)
    x, W_dec = torch.randn(30, 8, generator=generator), torch.randn(40, 8, generator=generator)
    b_dec = torch.randn(8, generator=generator)
    U = W_dec.double() / W_dec.double().norm(dim=1, keepdim=True)
    ordered = ((x - b_dec).double() @ U.t()).flatten().sort(descending=True).values
    found = nth_decoder_projection(x, W_dec, b_dec, 10)
    assert found == pytest.approx(float(ordered[10 * 30]), rel=1e-5)
