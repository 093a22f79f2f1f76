"""PW-MCC against every permutation, against duality, and where the answer is known."""

import itertools

import numpy as np
import pytest
import torch

from saeray.sae.assignment import Matching, best_assignment
from saeray.sae.stability import MOST_FEATURES, pw_mcc


def rows(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_it_is_the_best_of_all_permutations(n):
    for seed in range(10):
        a, b = rows(n, 3, seed).double(), rows(n, 3, seed + 100).double()
        unit_a, unit_b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        cos = (unit_a @ unit_b.t()).abs()
        best = max(
            sum(float(cos[i, j]) for i, j in enumerate(order)) / n
            for order in itertools.permutations(range(n))
        )
        assert pw_mcc(a.float(), b.float()) == pytest.approx(best, abs=1e-6)


def test_order_sign_and_length_of_features_do_not_matter():
    a = rows(300, 20, 0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    b = a[order] * torch.linspace(-3, 3.01, 300).unsqueeze(1)
    assert pw_mcc(a, b) == pytest.approx(1.0, abs=1e-6)


def test_features_that_have_their_counterpart_are_found_among_others():
    # In the standard basis: 6 of 8 features come again, the other two are at right angles to all.
    a, b = torch.eye(8, 12), torch.eye(8, 12)
    b[6:] = torch.eye(12)[8:10]
    assert pw_mcc(a, b[torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])]) == pytest.approx(6 / 8)
    b[6] = 0.0  # a row of zeros has no direction
    assert pw_mcc(a, b) == pytest.approx(6 / 8)


def test_the_sum_counts_and_not_who_is_nearest():
    # Each for itself, both rows want column 0; the best sum gives it to the second one.
    similarity = np.array([[0.9, 0.8], [0.85, 0.1]])
    assert best_assignment(similarity).tolist() == [1, 0]


def test_a_smaller_dictionary_is_matched_into_a_larger_one():
    a = rows(40, 16, 0)
    larger = torch.cat([rows(25, 16, 1), a, rows(25, 16, 2)])
    assert pw_mcc(a, larger) == pw_mcc(larger, a) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("n", "m"), [(200, 200), (150, 220), (1, 9)])
@pytest.mark.parametrize("kind", ["random", "cosines", "few values", "alike"])
def test_a_large_matching_is_the_best_one_by_duality(n, m, kind):
    # Prices p ≥ 0, zero for columns that nobody has, bound every matching's sum from above by
    # Σ_i max_j (s_ij - p_j) + Σ_j p_j. A matching that reaches the bound is the best one.
    generator = np.random.default_rng(n + m)
    similarity = {
        "random": lambda: generator.random((n, m)),
        "cosines": lambda: (rows(n, 8, 0) @ rows(m, 8, 1).t()).abs().numpy(),
        "few values": lambda: generator.integers(0, 3, (n, m)).astype(np.float32),
        "alike": lambda: np.ones((n, m), np.float32),
    }[kind]()
    matching = Matching(similarity)
    matching.bid(np.arange(n))
    for row in np.flatnonzero(matching.column_of < 0):
        matching.augment(int(row))
    columns = matching.column_of
    assert len(set(columns.tolist())) == n
    price = matching.price
    assert price.min() >= 0
    assert not price[np.setdiff1d(np.arange(m), columns)].any()
    bound = (similarity - price).max(axis=1).sum() + price.sum()
    assert similarity[np.arange(n), columns].sum(dtype=np.float64) == pytest.approx(bound, rel=1e-9)
    assert best_assignment(similarity).tolist() == columns.tolist()


def test_it_is_repeatable_whatever_the_number_of_threads():
    a, b = rows(400, 64, 0), rows(400, 64, 1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = pw_mcc(a, b)
        torch.set_num_threads(2)
        assert pw_mcc(a, b) == alone
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(3, 4), torch.ones(3, 5), r"\[3, 4\] and \[3, 5\]"),
        (torch.empty(0, 4), torch.ones(3, 4), "empty"),
        (torch.full((3, 4), float("nan")), torch.ones(3, 4), "not finite"),
        (torch.ones(MOST_FEATURES + 1, 1), torch.ones(1, 1), "32,769 features"),
    ],
)
def test_what_has_no_pw_mcc_is_refused(a, b, words):
    with pytest.raises(ValueError, match=words):
        pw_mcc(a, b)


def test_more_rows_than_columns_have_no_matching():
    with pytest.raises(ValueError, match="3 rows and 2 columns"):
        best_assignment(np.ones((3, 2)))
