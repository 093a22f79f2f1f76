"""Top contexts, samples of bands and histograms against a brute force over everything at once."""

import random
from itertools import pairwise

import pytest
import torch

from saeray.sae.feature_contexts import (
    BANDS,
    FULL,
    HISTOGRAM_BINS,
    FeatureContexts,
    chance,
    state_bytes,
)

C, L, N = 12, 9, 400
TOP, PER_BAND, SHOWN = 6, 3, 5


@pytest.fixture(scope="module")
def latents():
    """[N, C, L]: rare and dense features, one that never fires, one with ties, one that grows."""
    g = torch.Generator().manual_seed(0)
    f = torch.randn(N, C, L, generator=g).exp() * (torch.rand(N, C, L, generator=g) < 0.2)
    f[:, :, 1] = 0
    f[:, :, 2] *= torch.rand(N, 1, generator=g) < 0.01  # fewer contexts than there are places
    f[:, :, 3] = torch.rand(N, C, generator=g) + 1  # always
    f[:, :, 4] = (f[:, :, 4] * 2).round() / 2  # many equal peaks
    f[:, :, 5] *= torch.linspace(-15, 12, N).exp().unsqueeze(1)
    return f


def gathered(latents, order, into=None):
    of = into or FeatureContexts(L, C, TOP, PER_BAND)
    for window in order:
        of.add(window, latents[window])
    return of


def facts(of, found):
    """All that is kept of each feature, as plain data."""
    result = []
    for j in range(L):
        windows = [*found.top_window[j].tolist(), *found.band_window[j].flatten().tolist()]
        slots = [*found.top_slot[j].tolist(), *found.band_slot[j].flatten().tolist()]
        kept = [
            (w, float(of.peak[j, s]), int(of.position[j, s]), of.share[j, s].tolist())
            for w, s in zip(windows, slots, strict=True)
            if w >= 0
        ]
        edges, tokens = found.band_edges[j].tolist(), found.band_tokens[j].tolist()
        result.append((kept, windows, edges, tokens, found.histogram[j].tolist()))
    return result


@pytest.fixture(scope="module")
def in_order(latents):
    of = gathered(latents, range(N))
    return of, of.found(SHOWN)


def brute_force(f, j):
    """(top, bands, histogram, width, edges) of a feature, with all its activations in hand."""
    peaks = f[:, :, j].amax(dim=1)
    fires = [w for w in range(N) if peaks[w] > 0]
    ranked = sorted(fires, key=lambda w: (-float(peaks[w]), w))
    largest = float(peaks.max())
    reach = 2.0**-40
    while reach <= largest:
        reach *= 2
    values = f[:, :, j][f[:, :, j] > 0].double()
    histogram = torch.bincount((values / reach * HISTOGRAM_BINS).long(), minlength=HISTOGRAM_BINS)
    used = int(largest / reach * BANDS) + 1
    units = [round(i * used / SHOWN) for i in range(SHOWN + 1)]
    bands = []
    for low, high in reversed(list(pairwise(units))):
        inside = [w for w in ranked[TOP:] if low <= int(float(peaks[w]) / reach * BANDS) < high]
        number = chance(torch.full((len(inside),), j), torch.tensor(inside, dtype=torch.int64))
        by_chance = sorted(
            zip(number.tolist(), inside, strict=True), key=lambda of: (-of[0], of[1])
        )
        bands.append({w for _, w in by_chance[:PER_BAND]})
    inner = [u / BANDS * reach for u in units[:-1]]
    tokens = [
        int(((values >= low / BANDS * reach) & (values < high / BANDS * reach)).sum())
        for low, high in pairwise(units)
    ]
    return ranked[:TOP], bands, histogram, reach / HISTOGRAM_BINS, [*inner, largest], tokens


@pytest.mark.parametrize("j", [0, 2, 3, 4, 5, 6, 7, 8])
def test_what_is_kept_is_what_a_brute_force_keeps(latents, in_order, j):
    _, found = in_order
    top, bands, histogram, width, edges, tokens = brute_force(latents, j)
    assert [w for w in found.top_window[j].tolist() if w >= 0] == top
    got = [{w for w in row.tolist() if w >= 0} for row in found.band_window[j]]
    assert got == bands
    assert found.histogram[j].tolist() == histogram.tolist()
    assert float(found.bin_width[j]) == width
    assert found.band_edges[j].tolist() == torch.tensor(edges).tolist()
    assert found.band_tokens[j].tolist() == tokens[::-1]
    assert int(found.histogram[j].sum()) == int((latents[:, :, j] > 0).sum()) == sum(tokens)


def test_a_context_is_kept_with_its_activations(latents, in_order):
    of, found = in_order
    pairs = zip(
        [*found.top_window.flatten(), *found.band_window.flatten()],
        [*found.top_slot.flatten(), *found.band_slot.flatten()],
        [
            j
            for t in (found.top_window, found.band_window)
            for j in range(L)
            for _ in t[j].flatten()
        ],
        strict=True,
    )
    seen = 0
    for window, slot, j in pairs:
        if window < 0:
            continue
        f = latents[window, :, j]
        assert of.peak[j, slot] == f.max()
        assert of.position[j, slot] == f.argmax()
        share = of.share[j, slot].float() / FULL
        torch.testing.assert_close(share * f.max(), f, rtol=0, atol=float(f.max()) / FULL)
        seen += 1
    assert seen > 80


def test_bands_come_largest_first_and_never_hold_a_top_context(in_order):
    of, found = in_order
    for j in range(L):
        top = {w for w in found.top_window[j].tolist() if w >= 0}
        below = [w for w in found.band_window[j].flatten().tolist() if w >= 0]
        assert len(below) == len(set(below)) and not top & set(below)
        for row in found.band_slot[j]:
            peaks = [float(of.peak[j, s]) for s in row.tolist() if s >= 0]
            assert peaks == sorted(peaks, reverse=True)


def test_a_feature_that_never_fires_has_nothing(in_order):
    _, found = in_order
    assert found.top_window[1].tolist() == [-1] * TOP
    assert set(found.band_window[1].flatten().tolist()) == {-1}
    assert found.histogram[1].sum() == 0 and found.largest[1] == found.bin_width[1] == 0


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_neither_order_nor_who_has_seen_what_changes_a_bit(latents, in_order, parts):
    order = list(range(N))
    random.Random(parts).shuffle(order)
    shares = [gathered(latents, order[i::parts]) for i in range(parts)]
    of = shares[0]
    for other in shares[1:]:
        of.merge(other)
    assert facts(of, of.found(SHOWN)) == facts(*in_order)


def test_a_state_that_was_saved_goes_on(latents, in_order):
    half = gathered(latents, range(0, N, 2))
    again = FeatureContexts(L, C, TOP, PER_BAND)
    again.load({name: t.clone() for name, t in half.tensors.items()})
    of = gathered(latents, range(1, N, 2), again)
    assert facts(of, of.found(SHOWN)) == facts(*in_order)


def test_the_bound_on_memory_is_what_it_holds():
    of = FeatureContexts(L, C, TOP, PER_BAND)
    assert sum(t.nbytes for t in of.tensors.values()) == state_bytes(L, C, TOP, PER_BAND)
    # As docs/features.md states it: d_sae 16,384, contexts of 128 tokens, the defaults.
    assert state_bytes(16384, 128, 20, 5) == 16384 * (100 * 270 + 260) < 450e6


def test_samples_are_uniform_over_a_band():
    """Of 200 equal contexts each is as likely to be kept for one feature as for another."""
    n, features = 200, 300
    of = FeatureContexts(features, 2, top=1, per_band=5)
    for window in range(n):
        of.add(window, torch.full((2, features), 1.5))
    kept = of.found(1).band_window.flatten()
    counts = torch.bincount(kept, minlength=n)
    assert counts[0] == 0  # the top one, by its number
    # 1,500 draws over 199 contexts: 7.5 each, standard deviation 2.7.
    assert counts[1:].max() < 20 and (counts[1:] == 0).sum() < 5
