"""Which entries are active, found by products in eight bits: none is missed, whatever they are."""

import itertools

import numpy as np
import pytest
import torch

from saeray.sae.entries import Entries, Selection
from saeray.sae.initial import initial_sae
from saeray.sae.numba_kernels import exact_values
from saeray.sae.screening import Screen

D, L, ROWS = 37, 211, 150  # no multiples of anything


def numbers(kind, dtype=torch.float32):
    """An SAE and rows of it that are hard in one way."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, D, generator=generator, dtype=dtype)
    sae = initial_sae(D, L, seed=3, b_dec=torch.zeros(D), dtype=dtype, encoder_init_scale=1.0)
    sae.W_enc.copy_(torch.randn(L, D, generator=generator, dtype=dtype).t())
    sae.b_enc.fill_(-2.0 * D**0.5)
    if kind == "outliers":  # as in a residual stream; features that make little of them
        x[:, [5, 20]] *= 100.0
        sae.W_enc[[5, 20]] *= 0.01
    elif kind == "scales":  # of rows and of features, over 24 orders of magnitude
        x *= torch.logspace(-12, 12, ROWS, dtype=dtype).unsqueeze(1)
        sae.W_enc.mul_(torch.logspace(-12, 12, L, dtype=dtype))
        sae.b_enc.mul_(torch.logspace(12, -12, L, dtype=dtype))
    elif kind == "nothing":
        x[::3] = 0.0
        sae.W_enc[:, ::5] = 0.0
        sae.b_enc[::2] = 0.0
        sae.b_enc[1::4] = 1e-6
    elif kind == "close":  # half of them within a rounding of their floor
        sae.b_enc.copy_(-(x[0] @ sae.W_enc))
    elif kind == "biased":
        sae.b_enc.copy_(-((x @ sae.W_enc).max(dim=0).values - 1e-4) - 1e4)
        sae.b_enc[::2] += 1e4
    return sae, x


def found(sae, x, *, int8, **selection):
    """(offsets, features, values) of all rows, and how many candidates there were."""
    screen = Screen(sae, len(x), int8=int8).set(sae, x, map)
    entries = Entries(sae, len(x), screen)
    chosen = Selection(sae, screen, x, **selection)
    chosen.look(slice(0, len(x)), entries)
    candidates = len(entries)
    chosen.find(slice(0, len(x)), entries)
    n = len(entries)
    return (entries.offsets.copy(), entries.feature[:n], entries.value[:n]), candidates


def all_of_them(sae, x, floor=None):
    """Every feature of every row looked at."""
    floors = torch.zeros(L, dtype=x.dtype) if floor is None else floor
    offsets, feature = np.arange(len(x) + 1) * L, np.tile(np.arange(L, dtype=np.int32), len(x))
    value = np.zeros(len(feature), x.numpy().dtype)
    n = exact_values(
        offsets, feature, value, x.numpy(), sae.W_enc.t().numpy(), sae.b_enc.numpy(), floors.numpy()
    )
    return offsets, feature[:n], value[:n]


def largest_of(everything, k, by):
    """Of each row's entries the k largest, of equal ones the first; by sorting."""
    offsets, feature, value = everything
    rows = []
    for begin, end in itertools.pairwise(offsets):
        ranked = value[begin:end] * by[feature[begin:end]]
        rows.append(begin + np.sort(np.argsort(-ranked, kind="stable")[:k]))
    kept = np.concatenate(rows)
    return np.cumsum([0, *map(len, rows)]), feature[kept], value[kept]


def same(a, b):
    return all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


KINDS = ["plain", "outliers", "scales", "nothing", "close", "biased"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_active_is_found_and_nothing_else(kind, dtype):
    sae, x = numbers(kind, dtype)
    everything = all_of_them(sae, x)
    assert 0 < len(everything[1]) < ROWS * L
    for int8 in (True, False):
        one, candidates = found(sae, x, int8=int8)
        assert same(one, everything), int8
        assert len(one[1]) <= candidates


@pytest.mark.parametrize("rounded", ["x", "W_enc"])
def test_what_rounding_leaves_over_may_all_point_one_way(rounded):
    """Where one side is whole numbers, and each of the other's loses 0.49 in the first's direction.

    Of ⟨x, w⟩ = Σ 127 (k + 0.49) the whole numbers have Σ 127 k: 0.49 · 127 · 36 = 2,240 less.
    """
    generator = torch.Generator().manual_seed(5)
    whole = 127.0 * (2 * torch.randint(0, 2, (L, D), generator=generator) - 1).float()
    other = whole.sign() * 90.49  # near 127: dimensions need no scaling
    other[:, 0] = whole[:, 0].sign() * 127.0  # so that a step is 1
    x, weights = (other, whole) if rounded == "x" else (whole, other)
    sae = initial_sae(D, L, seed=0, b_dec=torch.zeros(D), dtype=torch.float32)
    sae.W_enc.copy_(weights.t())
    sae.b_enc.copy_(1.0 - (x * weights).sum(dim=1))  # row j is one of feature j's, just so
    everything = all_of_them(sae, x)
    assert len(everything[1]) >= L
    for k in (None, 1):
        wanted = everything if k is None else largest_of(everything, k, np.ones(L, np.float32))
        assert same(found(sae, x, int8=True, k=k)[0], wanted)


@pytest.mark.parametrize("kind", ["plain", "outliers"])
def test_few_are_looked_at_that_are_not_active(kind):
    """Of 211 features 5 are active in a row; the steps of eight bits make it twice as many."""
    sae, x = numbers(kind)
    one, candidates = found(sae, x, int8=True)
    assert len(one[1]) > 3 * ROWS
    assert candidates < 2 * len(one[1])
    _, candidates = found(sae, x, int8=False)
    assert candidates < 1.01 * len(one[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_floor_of_each_feature(kind):
    sae, x = numbers(kind)
    floor = torch.linspace(-1, 3, L)
    everything = all_of_them(sae, x, floor)
    for int8 in (True, False):
        assert same(found(sae, x, int8=int8, floor=floor)[0], everything)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("k", [1, 4, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_the_k_largest_of_a_row(kind, k, weighted):
    sae, x = numbers(kind)
    sae.W_enc[:, 40:44] = sae.W_enc[:, 39:40]  # equal ones: those that come first
    sae.b_enc[39:44] = 3.0
    by = torch.linspace(0.5, 2.0, L) if weighted else None
    if by is not None:
        by[39:44] = 1.0
    wanted = largest_of(
        all_of_them(sae, x), k, np.ones(L, np.float32) if by is None else by.numpy()
    )
    for int8 in (True, False):
        one, candidates = found(sae, x, int8=int8, k=k, by=by)
        assert same(one, wanted), int8
        if k == 4 and kind == "plain":
            assert candidates < (12 if int8 else 5) * ROWS


@pytest.mark.parametrize("k", [None, 4])
@pytest.mark.parametrize("what", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_finite_number_is_seen(what, k):
    """One in a row's numbers shows in all of its features, one in a feature's in all rows."""
    for int8 in (True, False):
        sae, x = numbers("plain")
        sae.W_enc[3, 17] = what
        (offsets, feature, value), _ = found(sae, x, int8=int8, k=k)
        hit = ~np.isfinite(value[feature == 17])
        # ±inf times a number of either sign: half of the rows.
        assert hit.sum() > (0.3 if torch.isinf(torch.tensor(what)) else 0.99) * ROWS

        sae, x = numbers("plain")
        x[9, 3] = what
        (offsets, feature, value), _ = found(sae, x, int8=int8, k=k)
        row = value[offsets[9] : offsets[10]]
        assert len(row) >= (4 if k else 0.3 * L) and not np.isfinite(row).any()
        assert np.isfinite(np.delete(value, np.s_[offsets[9] : offsets[10]])).all()


def test_entries_that_are_more_than_there_was_room_for():
    sae, x = numbers("plain")
    sae.b_enc.fill_(100.0)
    everything = all_of_them(sae, x)
    assert len(everything[1]) == ROWS * L > L + 64 * ROWS  # what a lane has room for at first
    for int8 in (True, False):
        for k in (None, 300):
            assert same(found(sae, x, int8=int8, k=k)[0], everything)
