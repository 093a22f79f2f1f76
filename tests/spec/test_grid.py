"""Grids: the product of lists, each point with a name of its own."""

import re

import pytest
from support.bundled import HOOK
from support.configs import config

from saeray.errors import ConfigError
from saeray.spec.config import resolve, stream_key
from saeray.spec.grid import derived_name, expand
from saeray.spec.plan import describe


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


def test_the_more_saes_the_less_often_each_is_evaluated():
    def every(n, **of):
        rates = [1e-3 * (i + 1) for i in range(n)]
        saes = expand(config(lr=rates, training_tokens=300_000_000, **of))
        return {s.config.eval_every for s in saes}

    # On 64 windows of 128 tokens, 8,192; 200 times as many are 400 batches of 4,096.
    assert every(4) == {400}
    # Of twelve an evaluation is 2 x 12 x 8,192 tokens of whole forwards, a 25th of 1,200 batches.
    assert every(12) == {1200}
    assert 2 * 12 * 8192 * 25 == 1200 * 4096
    assert every(12, eval_every=7) == {7}
    asha = {"name": "asha", "metric": "CE_loss_score"}
    assert every(12, scheduler=asha) == {None}  # it decides by them


def names(**axes):
    return [s.name for s in expand(config(**axes))]


def test_names_are_derived_and_safe():
    c = resolve(config(lr=0.0004))
    assert derived_name(c) == derived_name(resolve(config(lr=0.0004)))
    assert derived_name(c) != derived_name(c.replace(seed=1))
    assert derived_name(c).startswith("l1_coefficient=0.001,lr=0.0004,")
    assert names(hook_point=[HOOK]) == [f"hook_point={HOOK}"]
    assert names(model_name=["a/b", "a/c"]) == ["model_name=b", "model_name=c"]
    assert len(set(names(lr=[0.00041234567, 0.00041234568]))) == 2


def test_values_that_would_be_called_the_same_have_a_digest():
    hashed = r"dataset_path={}-[0-9a-f]{{6}}"
    for values, shown in (
        (["训练.parquet", "测试.parquet"], r"__\.parquet"),
        (["a/train.parquet", "b/train.parquet"], r"train\.parquet"),
        (["s3://one/x?region=a", "s3://two/x/?region=a"], "x"),
        (["Pile", "pile"], "[Pp]ile"),
    ):
        found = names(dataset_path=values)
        assert len({name.casefold() for name in found}) == 2
        assert all(re.fullmatch(hashed.format(shown), name) for name in found), found
    # The same value twice is still one SAE twice.
    with pytest.raises(ConfigError, match="duplicate trial dataset_path=p"):
        names(dataset_path=["d/p", "d/p"])


def test_names_are_never_longer_than_a_folders_may_be():
    long = ["/data/" + letter * 150 for letter in "ab"]
    found = names(dataset_path=long, model_name=long, lr=[1e-3, 2e-3])
    assert len(set(found)) == 8
    assert max(map(len, found)) <= 120
    assert all(re.search(r"model_name=a{13}-\w{6},|model_name=b{13}-\w{6},", n) for n in found)
    assert all(n.endswith(("lr=0.001", "lr=0.002")) for n in found)  # what is short is whole
    axes = dict(
        lr_warm_up_steps=[1, 2], feature_sampling_window=[1, 2], dead_feature_window=[1, 2],
        dead_feature_threshold=[1e-3, 1e-4], b_dec_init_method=["mean", "zeros"],
        wandb_log_frequency=[1, 2],
    )  # fmt: skip
    many = names(**axes)
    assert len(set(many)) == 64
    assert max(map(len, many)) <= 120


def test_lr_auto_is_a_number_in_every_sae_and_stands_beside_others():
    of_topk = dict(architecture="topk", k=8, d_in=128)
    saes = expand(config(lr=["auto", 1e-3], expansion_factor=[8, 32], **of_topk))
    assert {s.name: s.config.lr for s in saes} == {
        # 2e-4 / sqrt(128 * 8 / 2^14) and a quarter of that width's root less
        "expansion_factor=8,lr=auto": 8e-4,
        "expansion_factor=8,lr=0.001": 1e-3,
        "expansion_factor=32,lr=auto": 4e-4,
        "expansion_factor=32,lr=0.001": 1e-3,
    }
    assert "expansion_factor=8,lr=auto: 488 steps, lr 0.0008" in describe(saes)
    assert "lr=0.001: 488 steps\n" in describe(saes)
    # Read again, as by --resume or by a trial, it is that number.
    (once,) = expand(config(lr="auto", expansion_factor=8, **of_topk))
    assert type(once.config).from_dict(once.config.to_dict()) == once.config
    points = [{"lr": "auto", "k": 4}, {"lr": "4e-4", "k": 4}]  # YAML 1.1 reads 4e-4 as text
    both = expand(config(grid=points, expansion_factor=8, **of_topk))
    assert [s.config.lr for s in both] == [8e-4, 4e-4]
