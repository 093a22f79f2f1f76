"""Grids: the product of lists, each point with a name of its own."""

import pytest
from support.bundled import HOOK
from support.configs import config

from saeray.errors import ConfigError
from saeray.spec.config import resolve, stream_key
from saeray.spec.grid import derived_name, expand


def test_a_bad_value_inside_a_grid_is_found_when_it_is_expanded():
    with pytest.raises(ConfigError, match="lr = 0"):
        expand(config(lr=[1e-3, 0.0]))


def test_the_same_value_twice_is_a_duplicate_trial():
    with pytest.raises(ConfigError, match=r"duplicate trial lr=0\.001"):
        expand(config(lr=[1e-3, 1e-3]))


def test_a_grid_is_the_product_of_its_lists_and_shares_one_stream():
    saes = expand(config(lr=[1e-3, 2e-3], l1_coefficient=[1e-4, 2e-4, 3e-4], seed=[1, 2]))
    assert len(saes) == len({s.name for s in saes}) == 12
    assert saes[0].name == "seed=1,lr=0.001,l1_coefficient=0.0001"
    # The stream is seeded by the first seed and as long as the longest training.
    assert {s.config.data_seed for s in saes} == {1}
    assert len({stream_key(s.config) for s in saes}) == 1
    lengths = expand(config(training_tokens=[8192, 16384]))
    assert {s.config.stream_tokens for s in lengths} == {16384}


def test_names_are_derived_and_safe():
    c = resolve(config(lr=0.0004))
    assert derived_name(c) == derived_name(resolve(config(lr=0.0004)))
    assert derived_name(c) != derived_name(c.replace(seed=1))
    assert derived_name(c, ["hook_point"]) == f"hook_point={HOOK}"
    assert "/" not in derived_name(c.replace(model_name="a/b"), ["model_name"])
    close = [derived_name(c.replace(lr=x), ["lr"]) for x in (0.00041234567, 0.00041234568)]
    assert len(set(close)) == 2
