"""Coefficients in the units of other losses: the same trade between error and sparsity."""

import pytest
import torch
from support.configs import config

from saeray.sae.losses import sae_losses
from saeray.spec.coefficients import MeanNorms, converted, in_each_unit, most, silencing

NORMS = MeanNorms(rows=4096, plain=30.0, centred=20.0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("unit", ["sum", "none", "centred_norm"])
def test_losses_with_coefficients_of_their_units_are_one_loss_times_a_constant(unit, scaled):
    # Rows of one centred norm (the batch mean is zero), so that the estimate is exact too.
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(16, 8, generator=generator, dtype=torch.float64)
    half *= 20 / half.norm(dim=1, keepdim=True)
    x = torch.cat([half, -half])
    norms = MeanNorms(len(x), 20.0, 20.0)
    s = 8**0.5 / 20 if scaled else 1.0  # as normalize_activations has it
    W_enc = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    b_enc = torch.randn(24, generator=generator, dtype=torch.float64)

    def loss(W_dec, l1, normalization, scale=1.0):
        # The SAE of scale * x that is this one of x (b_dec is zero).
        return float(
            sae_losses(
                scale * x, W_enc, W_dec, scale * b_enc, torch.zeros(8, dtype=torch.float64),
                l1_coefficient=l1, normalization=normalization,
            ).overall
        )  # fmt: skip

    each = in_each_unit(0.3, unit, scaled, 8, norms)
    decoders = [torch.randn(24, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    given = [loss(W, 0.3, unit, s) for W in decoders]
    for other, l1 in each.items():
        found = [loss(W, l1, other) for W in decoders]
        assert found[0] / found[1] == pytest.approx(given[0] / given[1], rel=1e-6)


def test_the_lines_say_what_is_exact_and_what_estimated():
    configs = [config(l1_coefficient=x, recipe="sae_lens") for x in (3.0, 1.5)]
    # over d_in 100 for none, over 100 * 20 for centred_norm
    assert converted(configs, 100, NORMS) == [
        "l1_coefficient 1.5, 3 of sum = 0.015, 0.03 of none; ≈ 0.00075, 0.0015 of centred_norm "
        "(≈: by the mean norm 30, centred 20 over 4,096 rows of held-out text)"
    ]
    guide, april = config(l1_coefficient=1e-3), config(l1_coefficient=1.0, recipe="anthropic-april")
    lines = converted([guide, april], 100, NORMS)
    assert [x.split(" (")[0] for x in lines] == [
        "l1_coefficient 0.001 of centred_norm ≈ 2 of sum; ≈ 0.02 of none",
        # scaled by 10 / 30
        "l1_coefficient 1 of sum on scaled activations ≈ 3 of sum; ≈ 0.03 of none; "
        "≈ 0.0015 of centred_norm",
    ]


def test_of_many_coefficients_the_ends_are_shown():
    many = [config(l1_coefficient=x * 1e-3) for x in range(1, 10)]
    (line,) = converted(many, 100, NORMS)
    assert line.startswith("l1_coefficient 0.001, 0.002, …, 0.009 of centred_norm ≈ 2, 4, …, 18 of")


def test_a_coefficient_that_leaves_nothing_to_train_is_said_with_its_conversion():
    # The guide's loss: 2 / d_in, whatever the norms; summed squares: 2 * centred.
    assert most("centred_norm", False, 100, NORMS) == pytest.approx(0.02)
    assert most("centred_norm", True, 100, NORMS) == pytest.approx(0.02)
    assert most("sum", False, 100, NORMS) == pytest.approx(40.0)
    assert most("sum", True, 100, NORMS) == pytest.approx(40.0 * 10 / 30)
    usual = [config(l1_coefficient=x) for x in (5.0, 5.0, 1e-3)]
    # 5 / (100 * 20)
    assert silencing(usual, 100, NORMS) == [
        "l1_coefficient = 5: hardly a feature will be active: nothing is left to train. With "
        "mse_normalization: centred_norm no feature gains what it costs from about 0.02 on. A "
        "coefficient of sae_lens is of summed squares: its usual 5 is ≈ 0.0025 here; or write "
        "recipe: sae_lens, where it is what it is there."
    ]
    assert silencing([config(l1_coefficient=5.0, recipe="sae_lens")], 100, NORMS) == []
    assert silencing([config(architecture="topk", k=8)], 100, NORMS) == []
