"""Which rows a stream serves: positions, special tokens, and what a block has of them."""

import json

import pytest
import yaml
from support.configs import config, short_run

from saeray.errors import ConfigError
from saeray.files.cache import identities_of
from saeray.spec.config import LanguageModelSAERunnerConfig, digest, resolve, stream_key
from saeray.spec.grid import expand
from saeray.spec.plan import describe
from saeray.spec.stream import STREAM_FIELDS, positions


@pytest.mark.parametrize(
    ("given", "first", "last", "n"),
    [([1, 127], 1, 127, 127), ([1, -1], 1, 127, 127), ([-3, -2], 125, 126, 2), ([5, 5], 5, 5, 1)],
)
def test_both_ends_of_a_slice_are_served(given, first, last, n):
    served = positions(config(context_slice=given, context_size=128))
    assert (served[0], served[-1], len(served)) == (first, last, n)


def test_a_block_has_the_rows_that_are_served():
    assert config(context_size=16, store_batch_size=4).block_rows == 4 * 16
    sliced = dict(context_size=16, store_batch_size=4, context_slice=[4, 11])
    assert config(**sliced).block_rows == 4 * 8
    # Of one context less, so that four contexts are enough where some of their tokens are special.
    assert config(**sliced, exclude_special_tokens=True).block_rows == 3 * 8
    assert config(**sliced | dict(store_batch_size=1), exclude_special_tokens=[0]).block_rows == 8


@pytest.mark.parametrize(
    ("field", "bad", "words"),
    [
        ("context_slice", [1, None], "both of them served; -1 is the last one"),
        ("context_slice", [1], "positions of a context of 128, 0 to 127"),
        ("context_slice", [0, 128], "context_slice = \\[0, 128\\]"),
        ("context_slice", [-129, 5], "0 to 127"),
        ("context_slice", [9, 8], "in this order"),
        ("context_slice", 5, "a list or none is wanted here, not int"),
        ("exclude_special_tokens", [], "true, false, or a list"),
        ("exclude_special_tokens", [-1], "true, false, or a list"),
        ("exclude_special_tokens", "bos", "true or false or a list"),
        ("exclude_special_tokens", [0, True], "true or false or a list"),
    ],
)
def test_what_names_no_rows_is_refused(field, bad, words):
    with pytest.raises(ConfigError, match=words):
        expand(config(**{field: bad}))


def test_sae_lens_slices_are_said_in_our_words():
    config(seqpos_slice=[None])
    with pytest.raises(ConfigError, match=r"\(5, -5\) of sae_lens is \[5, -6\]"):
        config(seqpos_slice=[5, -5])


@pytest.mark.parametrize("field", ["context_slice", "exclude_special_tokens"])
def test_a_synthetic_model_has_neither(field):
    with pytest.raises(ConfigError, match=f"{field} = .*means nothing for model_name: synthetic"):
        LanguageModelSAERunnerConfig(
            model_name="synthetic:d_in=16,features=32,l0=2", **{field: [0, 3]}
        )


def test_a_list_is_one_value_and_a_list_of_lists_an_axis():
    c = config(context_slice=[1, -1], exclude_special_tokens=[0, "<pad>"], lr=[1e-3, 2e-3])
    assert (c.context_slice, c.exclude_special_tokens) == ((1, -1), (0, "<pad>"))
    assert [s.name for s in expand(c)] == ["lr=0.001", "lr=0.002"]
    written = json.loads(json.dumps(c.to_dict()))
    assert LanguageModelSAERunnerConfig.from_dict(written) == c
    assert yaml.safe_load(yaml.safe_dump(c.to_dict()))["context_slice"] == [1, -1]
    axes = config(context_slice=[[0, 63], [64, 127]], exclude_special_tokens=[False, True])
    names = [s.name for s in expand(axes)]
    assert names[0] == "exclude_special_tokens=False,context_slice=0_63"
    assert len(set(names)) == len({stream_key(s.config) for s in expand(axes)}) == 4
    points = config(grid=[dict(context_slice=[0, 5]), dict(exclude_special_tokens=[[3], ["<a>"]])])
    assert [s.config.context_slice for s in expand(points)] == [(0, 5), None, None]
    assert [s.config.exclude_special_tokens for s in expand(points)] == [False, (3,), ("<a>",)]


def test_streams_and_caches_are_called_as_before_where_all_rows_are_served():
    plain = short_run()
    assert stream_key(plain) == digest({name: getattr(plain, name) for name in STREAM_FIELDS})
    now, _ = identities_of(plain, ("w", "w"), "cpu", {"h": 4})
    assert not {"context_slice", "exclude_special_tokens"} & set(now)
    sliced = plain.replace(context_slice=[1, 3])
    assert stream_key(sliced) != stream_key(plain)
    now, _ = identities_of(sliced, ("w", "w"), "cpu", {"h": 4})
    assert now["context_slice"] == (1, 3) and now["block_shapes"] == {"h": [32 * 3, 4]}


def test_the_plan_says_what_a_row_costs():
    c = resolve(config(training_tokens=100_000, context_size=128, context_slice=[64, -1]))
    (line,) = [text for text in describe(expand(c)).splitlines() if "positions" in text]
    assert "rows at positions 64 to 127 of 0 to 127 alone: 2.000 LM tokens computed for" in line
    # 100,000 rows are 48.8 blocks of 32 x 64.
    assert "100,352 rows in 49 blocks of 2,048" in describe(expand(c))
    without = describe(expand(c.replace(context_slice=None, exclude_special_tokens=[0])))
    assert "no rows of tokens 0: how many LM tokens that takes depends on the text" in without
    assert "LM tokens in" in describe(expand(c.replace(context_slice=None)))
