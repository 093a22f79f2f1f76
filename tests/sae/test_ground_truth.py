"""What an SAE has found of a known dictionary: each figure by its arithmetic."""

import itertools

import numpy as np
import pytest
import torch

from saeray.sae.assignment import best_assignment
from saeray.sae.ground_truth import RecoverySums, matched

FEATURES = torch.eye(3)
# |cos| to the features: 1, 0, 0; 0, 0.6, 0.8; 0, 0, 1. Norms: 2, 1, 0.5.
W_DEC = torch.tensor([[2.0, 0, 0], [0, 0.6, 0.8], [0, 0, -0.5]])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (4, 4), (3, 6), (6, 7)])
def test_the_best_assignment_is_the_best_of_all(n, m):
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=(n, m)).round(1)  # with ties
        columns = best_assignment(values)
        assert len(set(columns)) == n
        best = max(values[range(n), list(c)].sum() for c in itertools.permutations(range(m), n))
        assert values[range(n), columns].sum() == pytest.approx(best)


def test_the_nearest_pair_first_would_not_be_the_best():
    # 0.9 leaves 0 for the other: 0.9 in all, where 0.8 + 0.7 = 1.5 is to be had.
    assert best_assignment(np.array([[0.9, 0.8], [0.7, 0.0]])).tolist() == [1, 0]


def test_an_assignment_needs_a_column_for_each_row_and_numbers():
    with pytest.raises(ValueError, match="transposed"):
        best_assignment(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="finite"):
        best_assignment(np.array([[np.nan, 1.0]]))


def test_features_and_latents_are_matched_by_the_angle_whatever_the_sign():
    found = matched(W_DEC, FEATURES)
    assert found.latent.tolist() == [0, 1, 2]
    assert found.cosine.tolist() == pytest.approx([1, 0.6, 1])


def test_mcc_and_share_found():
    got = RecoverySums(W_DEC, FEATURES).result()
    assert got.mcc == pytest.approx((1 + 0.6 + 1) / 3)
    assert got.features_found == pytest.approx(2 / 3)
    assert (got.firing_precision, got.shrinkage) == (None, None)  # no row: nothing to divide by


def test_fewer_latents_than_features():
    got = RecoverySums(W_DEC[:1], FEATURES).result()
    assert got.mcc == pytest.approx(1)  # of the one pair there is
    assert got.features_found == pytest.approx(1 / 3)
    assert matched(W_DEC[:1], FEATURES).latent.tolist() == [0, -1, -1]


def test_more_latents_than_features_and_one_that_is_zero():
    found = matched(torch.cat([torch.zeros(1, 3), W_DEC]), FEATURES)
    assert found.latent.tolist() == [1, 2, 3]


@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_firing_and_shrinkage(rows_at_once):
    truth = torch.tensor([[2.0, 1, 0], [1, 0, 0], [0, 0, 4], [0, 0, 0]])
    f = torch.tensor([[0.8, 0, 0], [0, 0, 0], [0, 0, 6], [0.1, 0, 1]])
    sums = RecoverySums(W_DEC, FEATURES)
    for part in range(0, 4, rows_at_once):
        sums.add(f[part : part + rows_at_once], truth[part : part + rows_at_once])
    got = sums.result()
    # rows where the feature / its latent / both fire:  2 / 2 / 1,  1 / 0 / 0,  1 / 2 / 1
    assert got.firing_precision == pytest.approx((1 / 2 + 0 + 1 / 2) / 3)
    assert got.firing_recall == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert got.firing_f1 == pytest.approx((2 / 4 + 0 + 2 / 3) / 3)
    # Of the first and third, which are found: 0.8 * 2 + 6 * 0.5 = 4.6 of 2 + 4 = 6.
    assert got.shrinkage == pytest.approx(1 - 4.6 / 6)
    assert got.metrics()["ground_truth/mcc"] == pytest.approx(2.6 / 3)


def test_a_feature_that_never_fires_counts_for_its_direction_only():
    sums = RecoverySums(W_DEC, FEATURES)
    sums.add(torch.tensor([[1.0, 1, 0]]), torch.tensor([[2.0, 0, 0]]))
    got = sums.result()
    assert (got.firing_precision, got.firing_recall, got.firing_f1) == (1, 1, 1)
    assert got.shrinkage == pytest.approx(0)  # 1 * 2 of 2
    assert got.mcc == pytest.approx(2.6 / 3)
