"""Which fields belong to which architecture, what is filled, and what is refused by name."""

from dataclasses import fields

import pytest
from support.configs import config

from saeray.errors import ConfigError
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.options import TrainingOptions
from saeray.spec.architectures import FIELDS, OWN_FIELDS, cautions, check_width, widths_of
from saeray.spec.grid import expand

LEAST = {"topk": {"k": 8}, "batchtopk": {"k": 8}, "matryoshka": {"k": 8},
         "jumprelu": {"l0_coefficient": 0.01}}  # fmt: skip


def test_config_and_step_know_the_same_architectures_and_fields():
    assert set(OWN_FIELDS) == set(ARCHITECTURES)
    assert set(FIELDS) <= {f.name for f in fields(TrainingOptions)}


@pytest.mark.parametrize("architecture", OWN_FIELDS)
def test_fields_of_another_architecture_are_refused_by_name(architecture):
    least = LEAST.get(architecture, {})
    config(architecture=architecture, **least)
    values = {"matryoshka_widths": "4,8", "auxk_scaling": "dead_share",
              "jumprelu_sparsity_loss_mode": "step", "use_ghost_grads": True,
              "jumprelu_ste_to_input": True, "feature_sampling_method": "l2",
              "gated_aux_decoder": "live"}  # fmt: skip
    for name in FIELDS:
        if name in OWN_FIELDS[architecture]:
            continue
        with pytest.raises(ConfigError, match=f"{name} = .*means nothing for architecture: "):
            config(architecture=architecture, **least | {name: values.get(name, 1)})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(architecture="topkk", k=3), "did you mean topk or batchtopk"),
        (dict(architecture="topk"), "k = None: architecture: topk needs k"),
        (dict(architecture="topk", k=2.5), "batchtopk takes others"),
        (dict(architecture="topk", k=2, target_l0=3), "target_l0 = 3.0: k = 2 says it already"),
        (dict(architecture="topk", k=0), "k = 0.0: above 0"),
        (dict(architecture="jumprelu"), "l0_coefficient = None"),
        (dict(architecture="jumprelu", jumprelu_sparsity_loss_mode="quadratic"), "target_l0 = N"),
        (
            dict(architecture="jumprelu", l0_coefficient=1, target_l0=3,
                 jumprelu_sparsity_loss_mode="tanh"),
            "target_l0 = 3.0: jumprelu gets there by",
        ),
        (dict(architecture="matryoshka", k=3, matryoshka_widths="9,4"), "ascending whole"),
        (dict(architecture="matryoshka", k=3, matryoshka_widths="a"), "ascending whole"),
        (dict(architecture="gated", gated_aux_decoder="free"), "one of constant, live"),
        (dict(architecture="p_anneal", p_end=0), "p_end = 0"),
        (dict(architecture="p_anneal", p_updates=999), "steps are left for p_updates = 999"),
        (dict(target_l0=-1), "target_l0 = -1"),
        (dict(l1_coefficient=-1), "l1_coefficient = -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        config(**given)


def test_what_is_filled():
    assert config().l1_coefficient == 1e-3 and config(recipe="sae_lens").l1_coefficient == 1.0
    topk = config(architecture="topk", target_l0=30)
    assert (topk.k, topk.auxk_coefficient, topk.recipe) == (30, 1 / 32, "sae_lens")
    assert config(architecture="topk", k=30, auxk_scaling="dead_share").auxk_coefficient == 1.0
    jumprelu = config(architecture="jumprelu", target_l0=30)
    assert (jumprelu.jumprelu_sparsity_loss_mode, jumprelu.l0_coefficient) == ("quadratic", 1.0)
    gated = config(architecture="gated")
    assert (gated.decoder_norm, gated.gated_aux_decoder) == ("free", "live")
    assert config(architecture="gated", decoder_norm="unit").gated_aux_decoder == "constant"
    for c in (topk, jumprelu, gated):  # sweep.yaml holds what was filled, and is read again
        assert type(c).from_dict(c.to_dict()) == c


def test_widths():
    assert widths_of(None, 1024) == (32, 96, 224, 480, 1024)
    assert widths_of("64,256", 1024) == (64, 256, 1024) == widths_of("64,256,1024", 1024)
    with pytest.raises(ConfigError, match="at most d_sae = 1024"):
        widths_of("64,2048", 1024)
    with pytest.raises(ConfigError, match=r"k = 513\.0: at most d_sae = 512"):
        check_width(config(architecture="topk", k=513), 128)


def test_a_coefficient_on_the_flat_part_is_warned_of():
    (text,) = cautions(config(architecture="jumprelu", l0_coefficient=1))
    assert "l0_coefficient = 1: under Adam" in text
    assert cautions(config(architecture="jumprelu", l0_coefficient=0.01)) == []


def test_in_a_grid_over_architectures_each_takes_what_is_its_own():
    saes = expand(
        config(
            architecture=["standard", "topk", "batchtopk"], l1_coefficient=[1e-3, 2e-3], k=[8, 16]
        )
    )
    assert [s.name for s in saes] == [
        "architecture=standard,l1_coefficient=0.001",
        "architecture=standard,l1_coefficient=0.002",
        "architecture=topk,k=8",
        "architecture=topk,k=16",
        "architecture=batchtopk,k=8",
        "architecture=batchtopk,k=16",
    ]  # fmt: skip
    assert saes[0].config.k is None and saes[2].config.l1_coefficient is None
    steered = expand(config(architecture=["gated", "jumprelu", "topk"], target_l0=[10, 20]))
    assert [s.config.target_l0 for s in steered] == [10, 20] * 3
    with pytest.raises(ConfigError, match=r"k = 8\.0: means nothing for architecture: standard"):
        expand(config(architecture=["standard", "gated"], k=8))
