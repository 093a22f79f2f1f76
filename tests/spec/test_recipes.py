"""Recipes fill what is not given, and nothing else."""

import pytest
from support.configs import config

from saeray.errors import ConfigError
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.spec.grid import expand
from saeray.spec.recipes import FIELDS, RECIPES, described

RUN = dict(training_tokens=1000 * 1024, train_batch_size=1024)  # 1,000 steps


def values(**changes):
    c = config(**(RUN | changes))
    return {name: getattr(c, name) for name in FIELDS}


def test_each_recipe_as_its_source_has_it():
    guide = dict(
        encoder_init="decoder_transpose", encoder_init_scale=0.1, decoder_init_norm=1.0,
        decoder_norm="free", mse_normalization="centred_norm", gradient_clip=1e-3,
        b_dec_init_method="zeros", lr_warm_up_steps=0, lr_decay_steps=200,
        l1_warm_up_steps=200, normalize_activations="none", dead_feature_window=100,
    )  # fmt: skip
    assert values() == values(recipe="guide") == guide
    then = guide | dict(
        encoder_init="independent", encoder_init_scale=1.0, decoder_norm="unit",
        b_dec_init_method="geometric_median", lr_warm_up_steps=500, lr_decay_steps=0,
        l1_warm_up_steps=0, gradient_clip=0.0, dead_feature_window=1000,
    )  # fmt: skip
    assert values(recipe="guide-2024") == then
    sae_lens = guide | dict(
        encoder_init_scale=1.0,
        decoder_init_norm=0.1,
        mse_normalization="sum",
        gradient_clip=1.0,
        l1_warm_up_steps=0,
        lr_decay_steps=0,
    )
    assert values(recipe="sae_lens") == sae_lens
    # l1 over the first 5 % of 1,000 steps, lr over the last 20 %
    april = dict(l1_warm_up_steps=50, lr_decay_steps=200, normalize_activations="expected_average")
    assert values(recipe="anthropic-april") == sae_lens | april


def test_the_guides_warm_ups_end_in_a_run_that_is_long_enough():
    assert values(training_tokens=100_000 * 1024)["l1_warm_up_steps"] == 5000
    assert values(training_tokens=10_000 * 1024)["l1_warm_up_steps"] == 2000
    assert values(training_tokens=40 * 1024)["l1_warm_up_steps"] == 8
    assert values(lr_warm_up_steps=500)["lr_warm_up_steps"] == 500


def test_a_schedule_that_is_given_is_the_whole_of_it():
    for name in ("constantwithwarmup", "cosineannealing"):
        c = config(**RUN, lr_scheduler_name=name)
        assert (c.lr_scheduler_name, c.lr_decay_steps) == (name, 0)
    assert config(**RUN, lr_scheduler_name="constant", lr_decay_steps=7).lr_decay_steps == 7
    assert config(**RUN).lr_scheduler_name == "constantwithwarmup"


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_given_stays(recipe):
    given = dict(
        encoder_init="independent", encoder_init_scale=0.5, decoder_init_norm=1.0,
        decoder_norm="unit", mse_normalization="none", gradient_clip=2.0, b_dec_init_method="mean",
        lr_warm_up_steps=3, lr_decay_steps=4, l1_warm_up_steps=5, normalize_activations="none",
        dead_feature_window=7,
    )  # fmt: skip
    assert values(recipe=recipe, **given) == given


def test_a_decoder_of_the_other_kind_starts_as_its_kind_does():
    for recipe in ("guide", "sae_lens"):
        unit = values(recipe=recipe, decoder_norm="unit")
        assert (unit["decoder_init_norm"], unit["encoder_init_scale"]) == (1.0, 0.1)
    free = values(recipe="guide-2024", decoder_norm="free")
    assert (free["decoder_init_norm"], free["encoder_init_scale"]) == (0.1, 1.0)
    with pytest.raises(ConfigError, match=r"decoder_init_norm = 0\.1"):
        config(decoder_norm="unit", decoder_init_norm=0.1)


def test_a_recipe_is_an_axis_and_is_filled_at_each_point():
    points = expand(config(**RUN, recipe=["guide-2024", "sae_lens"]))
    assert [p.name for p in points] == ["recipe=guide-2024", "recipe=sae_lens"]
    assert [p.config.decoder_norm for p in points] == ["unit", "free"]
    lengths = expand(config(training_tokens=[102_400, 1_024_000], train_batch_size=1024))
    assert [p.config.l1_warm_up_steps for p in lengths] == [20, 200]
    with pytest.raises(ConfigError, match=r"recipe = 'guid'.*did you mean guide"):
        config(recipe="guid")


def test_what_is_filled_is_said_and_kept():
    c = config(**RUN, recipe="anthropic-april")
    assert "recipe anthropic-april: encoder_init: decoder_transpose" in described(c)
    assert c.to_dict()["lr_decay_steps"] == 200
    assert type(c).from_dict(c.to_dict()) == c


def test_a_sweep_from_before_recipes_goes_on_as_it_began(tmp_path):
    import yaml

    old = config(**RUN).to_dict()
    for name in ("recipe", *FIELDS):
        del old[name]
    old |= dict(lr_warm_up_steps=500, mse_normalization="centred_norm")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.yaml").write_text(yaml.safe_dump({"saes": {"sae": old}}))
    read = SweepFolder(Folder.at(tmp_path / "s"), "s").read_configs()["sae"]
    assert (read.recipe, read.encoder_init) == ("guide-2024", "independent")
