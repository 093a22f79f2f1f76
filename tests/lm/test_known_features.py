"""Rows of known features: a pure function of their number, with the statistics that are asked for.

Tolerances are five standard errors or more; the seeds are fixed, so they hold or they do not.
"""

import numpy as np
import pytest
import torch

from saeray.lm.synthetic import GROUP, KnownFeatures, SyntheticModel
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.synthetic import parse

ROWS = np.arange(20_000)
EVERYTHING = "synthetic:d_in=16,features=96,l0=4,zipf=0.5,hierarchy=2,correlation=0.4,noise=0.1"


def known(name, data_seed=7):
    return KnownFeatures(parse(name), data_seed)


def fired(name, **changes):
    """bool [rows, features]."""
    features = known(name, **changes)
    return features.magnitudes(len(ROWS), features.entries(ROWS)) > 0


def test_a_row_is_the_same_whoever_asks_for_it_and_beside_what():
    one, again = known(EVERYTHING), known(EVERYTHING)
    numbers = np.array([5, 70_001, 3, 2**31 - 1, 4, 70_001])
    together = one.rows(numbers)
    for number, row in zip(numbers, together, strict=True):
        assert np.array_equal(again.rows(np.array([number]))[0], row)
    long = one.rows(np.arange(70_000, 75_000))  # several times what is made at once
    assert np.array_equal(long[1], together[1])
    assert np.array_equal(together[1], together[5])


def test_seeds_say_what_fires_and_where_it_points():
    base, other_rows = known(EVERYTHING), known(EVERYTHING, data_seed=8)
    other_directions = known(EVERYTHING + ",seed=1")
    assert np.array_equal(base.dictionary, other_rows.dictionary)
    assert not np.array_equal(base.dictionary, other_directions.dictionary)
    assert not np.array_equal(base.rows(ROWS[:9]), other_rows.rows(ROWS[:9]))


def test_a_row_is_the_sum_of_what_fires_in_it():
    features = known("synthetic:d_in=16,features=48,l0=4,hierarchy=2")
    entries = features.entries(ROWS[:500])
    magnitudes = features.magnitudes(500, entries).astype(np.float64)
    assert np.allclose(features.rows(ROWS[:500]), magnitudes @ features.dictionary, atol=1e-5)
    assert np.allclose(np.linalg.norm(features.dictionary, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("zipf", [0, 1])
def test_features_fire_as_often_as_is_asked_for(zipf):
    name = f"synthetic:features=64,l0=3,zipf={zipf}"
    wanted = np.array(parse(name).frequencies())
    found = fired(name).mean(axis=0)
    standard_error = np.sqrt(wanted * (1 - wanted) / len(ROWS))
    assert (np.abs(found - wanted) < 5 * standard_error).all()
    assert found.sum() == pytest.approx(3, rel=0.02)  # one row's L0 varies by √3: 0.4 % of 3


def test_children_fire_with_their_parent_one_at_most():
    fires = fired("synthetic:features=64,l0=4,hierarchy=3")
    parents, children = fires[:, :16], fires[:, 16:].reshape(-1, 16, 3)
    assert (children.sum(axis=2) <= parents).all()
    # 4 = 16 p (1 + 1/2), so p = 1/6; half of a parent's firings have a child.
    assert parents.mean() == pytest.approx(1 / 6, rel=0.03)
    assert children.sum() / parents.sum() == pytest.approx(0.5, abs=0.01)
    # Each of the three equally often: none of 48 further than a fifth from 20,000 / 6 / 6.
    assert np.allclose(children.sum(axis=0), len(ROWS) / 36, rtol=0.25)


def test_features_of_a_group_fire_together():
    plain = "synthetic:features=16,l0=4"  # two groups of eight, p = 1/4
    fires = fired(plain + ",correlation=0.5").astype(float)
    found = np.corrcoef(fires.T)
    same_group = np.equal.outer(np.arange(16) // GROUP, np.arange(16) // GROUP)
    between = found[same_group & ~np.eye(16, dtype=bool)]
    assert np.allclose(between, 0.5, atol=0.04)
    assert np.allclose(found[~same_group], 0, atol=0.04)
    assert np.allclose(fires.mean(axis=0), 0.25, atol=0.016)  # as often as without
    together = fired(plain + ",correlation=1")
    assert (together[:, :8] == together[:, :1]).all()


def test_magnitudes_and_noise():
    features = known("synthetic:features=64,l0=3,spread=0.2,noise=0.5")
    magnitude = features.entries(ROWS).magnitude
    assert 0.8 <= magnitude.min() < 0.801
    assert 1.199 < magnitude.max() <= 1.2
    assert magnitude.mean() == pytest.approx(1, abs=0.003)
    noise = features.noise(ROWS).astype(np.float64)
    assert noise.mean() == pytest.approx(0, abs=0.003)
    assert noise.std() == pytest.approx(0.5, rel=0.01)
    assert np.corrcoef(noise[:, 0], noise[:, 1])[0, 1] == pytest.approx(0, abs=0.04)


def test_the_model_gives_rows_in_activation_dtype():
    config = resolve(
        LanguageModelSAERunnerConfig(
            model_name=EVERYTHING, device="cpu", activation_dtype="bfloat16", seed=7
        )
    )
    model = SyntheticModel(config, [config.hook_point])
    tokens = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    x = model.activations(tokens)["activations"]
    assert (x.dtype, x.shape) == (torch.bfloat16, (12, 16))
    assert torch.equal(x, torch.from_numpy(known(EVERYTHING).rows(ROWS[:12])).bfloat16())
    assert model.facts.d_in == {"activations": 16}
