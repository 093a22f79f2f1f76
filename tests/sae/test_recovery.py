"""Toy recovery: an SAE trained on a known sparse dictionary finds it."""

import pytest
import torch

from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.sample_statistics import initial_b_dec
from saeray.sae.trainer import SAETrainer

D, N_TRUE, ACTIVE = 64, 128, 3  # twice as many directions as dimensions, three at a time


def activations(n, truth, generator):
    """Rows with ACTIVE of the true directions at random strengths, around a centre off zero."""
    which = torch.rand(n, N_TRUE, generator=generator).argsort(dim=1)[:, :ACTIVE]
    strengths = torch.zeros(n, N_TRUE)
    strengths.scatter_(1, which, 0.5 + torch.rand(n, ACTIVE, generator=generator))
    return strengths @ truth + 0.3


@pytest.mark.slow
@pytest.mark.ci
def test_a_known_dictionary_is_recovered():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(N_TRUE, D, generator=generator)
    truth /= truth.norm(dim=1, keepdim=True)
    b_dec = initial_b_dec(activations(1024, truth, generator), "geometric_median")
    steps = 3000
    trainer = SAETrainer(
        initial_sae(D, 2 * N_TRUE, seed=0, b_dec=b_dec, dtype=torch.float32),
        TrainingOptions(
            lr=2e-3,
            l1_coefficient=1.5e-3,
            total_steps=steps,
            lr_scheduler_name="linearwarmupdecay",
            lr_warm_up_steps=100,
        ),
    )
    step = PackStep(2)
    for _ in range(steps):
        step.step([trainer], activations(512, truth, generator))
    alive = trainer.sae.W_dec[trainer.firing_frequency > 1e-3]
    cosines = truth @ alive.T  # [true, learned], both of norm 1
    assert float(cosines.max(dim=1).values.mean()) >= 0.95
    x = activations(4096, truth, generator)
    active = (trainer.sae.encode(x) > 0).float().sum(dim=1).mean()
    assert active < 4 * ACTIVE  # and it is sparse, not a rotation of everything


def test_the_geometric_median_is_where_outliers_do_not_pull():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 8, generator=generator)
    rows[:20] += 1000.0
    assert float(initial_b_dec(rows, "mean").norm()) > 200  # 20 of 200 rows, 1000 * sqrt(8) away
    assert float(initial_b_dec(rows, "geometric_median").norm()) < 1
    assert torch.equal(initial_b_dec(rows, "zeros"), torch.zeros(8))
