"""What the pack loop takes from a config, and gives away."""

from types import SimpleNamespace

import torch
from support.configs import short_run

from saeray.cluster.checkpoint_writer import checkpoint_steps
from saeray.cluster.pack import Pack
from saeray.sae.architectures.base import PARAMETERS
from saeray.sae.initial import initial_sae


def test_checkpoints_come_at_the_guides_tokens():
    # range(0, 80, 80 // 4)[1:] = 20, 40, 60 tokens: steps 2.5 -> 2, 5, 7.5 -> 8 of 8 tokens.
    assert checkpoint_steps(short_run(n_checkpoints=4)) == {2, 5, 8}
    assert checkpoint_steps(short_run(n_checkpoints=0)) == set()


def test_a_snapshot_stays_what_it_was_while_the_training_goes_on(ray_instance):
    import ray

    sae = initial_sae(64, 2048, seed=0, b_dec=torch.zeros(64), dtype=torch.float32)
    before = {name: getattr(sae, name).clone() for name in PARAMETERS}
    member = SimpleNamespace(trainer=SimpleNamespace(published=sae))
    snapshot = Pack.snapshot(None, member)
    for name in PARAMETERS:
        getattr(sae, name).add_(1.0)  # in place, as the step does
    got = ray.get(snapshot)
    assert all(
        torch.equal(torch.from_numpy(got.tensors[name].copy()), before[name]) for name in PARAMETERS
    )
