"""What the pack loop takes from a config, and gives away."""

from types import SimpleNamespace

import pytest
import torch
from support.configs import short_run

from saeray.cluster.pack import Pack, checkpoint_steps, compute_dtype
from saeray.sae.standard import initial_sae
from saeray.sae.trainer import PARAMETERS


def test_checkpoints_come_at_the_guides_tokens():
    # range(0, 80, 80 // 4)[1:] = 20, 40, 60 tokens: steps 2.5 -> 2, 5, 7.5 -> 8 of 8 tokens.
    assert checkpoint_steps(short_run(n_checkpoints=4)) == {2, 5, 8}
    assert checkpoint_steps(short_run(n_checkpoints=0)) == set()


@pytest.mark.parametrize(
    ("given", "dtype", "on_cpu", "on_cuda"),
    [
        ("auto", "float32", "float32", "bfloat16"),
        ("auto", "float64", "float32", "float32"),  # that is: as dtype says
        ("tf32", "float32", "float32", "tf32"),
        ("bfloat16", "float32", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32", "float32"),
    ],
)
def test_what_products_are_made_in_is_a_matter_of_the_device(given, dtype, on_cpu, on_cuda):
    config = short_run(compute_dtype=given, dtype=dtype)
    assert compute_dtype(config, torch.device("cpu")) == on_cpu
    assert compute_dtype(config, torch.device("cuda")) == on_cuda


def test_a_snapshot_stays_what_it_was_while_the_training_goes_on(ray_instance):
    import ray

    sae = initial_sae(64, 2048, seed=0, b_dec=torch.zeros(64), dtype=torch.float32)
    before = {name: getattr(sae, name).clone() for name in PARAMETERS}
    member = SimpleNamespace(trainer=SimpleNamespace(published=sae))
    snapshot = Pack.snapshot(None, member)
    for name in PARAMETERS:
        getattr(sae, name).add_(1.0)  # in place, as the step does
    got = ray.get(snapshot)
    assert all(torch.equal(torch.from_numpy(got[name].copy()), before[name]) for name in PARAMETERS)
