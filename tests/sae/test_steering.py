"""Steering to an L0: the controller by its arithmetic, and where SAEs end."""

import math

import pytest
import torch

from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.steering import Steering
from saeray.sae.trainer import SAETrainer


def options(**changes):
    values = dict(lr=1e-3, total_steps=1000, target_l0=10.0, l1_warm_up_steps=2)
    return TrainingOptions(**(values | changes))


def test_a_step_is_what_the_formula_says():
    s = Steering(options())  # g = 16 / 1000; the trend counts for 50 steps
    s.see(0, 20.0)
    s.see(1, 20.0)
    assert s.multiplier == 1.0  # the coefficient's own warm-up is not over
    # The mean moves by 0.2 log(18 / 20), the trend by 0.04 of that.
    moved = 0.2 * math.log(0.9)
    off = math.log(2) + moved
    s.see(2, 18.0)
    assert off > 0.5  # too far for the drift
    assert s.log_multiplier == pytest.approx(0.016 * (off + 50 * 0.04 * moved), rel=1e-12)
    # Next the mean is near enough, so that the drift moves too; e is below -1 and counts as that.
    off += 0.2 * (math.log(1.0) - (math.log(20) + moved))
    before = s.log_multiplier
    s.see(3, 1.0)
    assert abs(off) < 0.5
    assert s.drift == pytest.approx(-0.8 * 0.016**2, rel=1e-12)
    assert s.log_multiplier - before == pytest.approx(-0.016 + s.drift, rel=1e-12)
    held = s.multiplier
    s.see(950, 500.0)  # the last twentieth
    assert s.multiplier == held


def test_silence_lowers_the_coefficient():
    s = Steering(options(l1_warm_up_steps=0))
    s.see(0, 0.0)
    assert s.log_multiplier == -0.016


def sparse_rows(n, generator):
    """Of 48 directions in 24 dimensions, each there in one row of eight."""
    directions = torch.randn(48, 24, generator=torch.Generator().manual_seed(1))
    there = torch.rand(n, 48, generator=generator) < 1 / 8
    strength = torch.rand(n, 48, generator=generator) + 0.5
    return (there * strength) @ directions / 24**0.5


@pytest.mark.parametrize(
    ("architecture", "target", "coefficient", "within"),
    [
        ("standard", 3.0, 0.5, 0.05),
        ("standard", 12.0, 0.002, 0.05),
        ("gated", 3.0, 0.002, 0.05),
        ("gated", 12.0, 0.5, 0.05),
        ("p_anneal", 3.0, 0.5, 0.1),  # its penalty is still changing when steering must settle
        ("p_anneal", 12.0, 0.002, 0.1),
        ("jumprelu", 3.0, 1.0, 0.05),
        ("jumprelu", 12.0, 1.0, 0.05),
    ],
)
def test_held_out_l0_is_the_target(architecture, target, coefficient, within):
    o = options(
        architecture=architecture, lr=3e-3, total_steps=700, target_l0=target, gradient_clip=1.0,
        l1_coefficient=coefficient, l0_coefficient=coefficient,
        jumprelu_sparsity_loss_mode="quadratic", mse_normalization="sum", lr_warm_up_steps=0,
        p_end=0.5, p_anneal_start_step=100, p_updates=5,
    )  # fmt: skip
    sae = initial_sae(
        24, 64, seed=0, b_dec=torch.zeros(24), dtype=torch.float32,
        encoder_init="decoder_transpose", encoder_init_scale=0.1,
        architecture=ARCHITECTURES[architecture], options=o,
    )  # fmt: skip
    t, pack, generator = SAETrainer(sae, o), PackStep(), torch.Generator().manual_seed(0)
    for _ in range(o.total_steps):
        pack.step([t], sparse_rows(512, generator))
    l0 = (sae.encode(sparse_rows(20_000, generator)) > 0).sum(dim=1).float().mean()
    assert float(l0) == pytest.approx(target, rel=within)
    assert t.steering.multiplier != 1.0
