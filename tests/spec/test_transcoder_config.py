"""The fields of a transcoder, and what is refused."""

import pytest
from support.bundled import HOOK
from support.configs import config

from saeray.errors import ConfigError
from saeray.spec.memory import sae_bytes
from saeray.spec.plan import cut_packs, hook_points_of
from saeray.spec.transcoder import check_order

OUT = "blocks.2.hook_mlp_out"


def test_it_reads_two_hook_points_with_the_layer_filled_in():
    c = config(hook_point="blocks.{layer}.mlp.hook_in", hook_point_layer=2,
               hook_point_out="blocks.{layer}.hook_mlp_out")  # fmt: skip
    assert c.hooks_read == ("blocks.2.mlp.hook_in", OUT)
    assert config(hook_point_out=OUT).hooks_read == (HOOK, OUT)
    assert config().hooks_read == (HOOK,)
    assert hook_points_of([c, config()]) == [OUT, HOOK, "blocks.2.mlp.hook_in"]


def test_its_encoder_begins_independently_whatever_the_recipe():
    for recipe in ("guide", "guide-2024", "sae_lens", "anthropic-april"):
        assert config(recipe=recipe, hook_point_out=OUT).encoder_init == "independent"
    assert config(recipe="sae_lens").encoder_init == "decoder_transpose"
    # The guide knows no transcoders.
    assert (config().recipe, config(hook_point_out=OUT).recipe) == ("guide", "sae_lens")


def test_other_names_of_the_field_are_taken():
    assert config(hook_name_out=OUT).hook_point_out == OUT
    assert config(out_hook_point=OUT).hook_point_out == OUT
    with pytest.raises(ConfigError, match=r"is_transcoder.*hook_point_out"):
        config(is_transcoder=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(skip_connection=True), "skip_connection.*hook_point_out"),
        (dict(hook_point_out=HOOK), "hook_point_out.*leave it out"),
        (dict(hook_point_out=OUT, encoder_init="decoder_transpose"), "encoder_init.*independent"),
        (
            dict(hook_point_out=OUT, feature_sampling_method="l2"),
            "feature_sampling_method.*use_ghost_grads",
        ),
        (
            dict(hook_point="ln_final.hook_in", hook_point_out="blocks.{layer}.x"),
            "hook_point_layer.*blocks.{layer}.x needs",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def test_known_features_have_one_hook_point():
    from saeray.spec.config import LanguageModelSAERunnerConfig

    with pytest.raises(ConfigError, match=r"hook_point_out.*synthetic"):
        LanguageModelSAERunnerConfig(model_name="synthetic:", hook_point_out=OUT)


def test_what_is_computed_before_what_it_is_made_of_is_refused():
    c = config(hook_point_out=OUT)
    check_order(c, ("x", HOOK, OUT))
    with pytest.raises(ConfigError, match=r"hook_point_out.*before blocks.2.hook_resid_pre"):
        check_order(c, (OUT, HOOK))


def test_what_it_takes():
    # W_enc 1000 x 8000, W_dec 8000 x 500, b_enc, b_dec, b_dec_out and W_skip 1000 x 500.
    widths = {HOOK: 1000, OUT: 500}
    plain = config(expansion_factor=8, hook_point_out=OUT)
    assert sae_bytes(plain, widths) == (12_000_000 + 9_500) * 6 * 4
    skip = plain.replace(skip_connection=True)
    assert sae_bytes(skip, widths) == (12_500_000 + 9_500) * 6 * 4


def test_transcoders_of_the_same_hooks_are_kept_together():
    from saeray.spec.grid import SAE

    outs = [OUT, None, OUT, None]
    saes = [SAE(str(i), config(hook_point_out=out, seed=i)) for i, out in enumerate(outs)]
    packs = cut_packs(saes, 2)
    assert [[sae.name for sae in pack] for pack in packs] == [["1", "3"], ["0", "2"]]
