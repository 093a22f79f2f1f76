"""Whole packs on a GPU: what they learn on the CPU, twice the same bits, and on from a checkpoint.

Skipped where there is none. What a GPU runs can be tested without Ray:

    python -m pytest --noconftest tests/sae/test_on_a_gpu.py tests/sae/test_gpu_step.py
"""

from __future__ import annotations

import os

import pytest
import torch

from saeray.sae import trainer as trainer_module
from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.gpu import sparse_step as gpu_step
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer


@pytest.fixture(autouse=True)
def both_ways(monkeypatch):
    """Small as these are, from active entries alone once few are active."""
    monkeypatch.setattr(trainer_module, "SPARSE_ROWS_ON_GPU", 1)
    for dtype in trainer_module.SPARSE_BELOW_ON_GPU:
        monkeypatch.setitem(trainer_module.SPARSE_BELOW_ON_GPU, dtype, 1 / 100)


pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="not interpreted"),
]

B, L, D = 256, 1536, 64
STEPS = 60
LIVELY = 6  # features that x is made of, in each row
OWN = {
    # L0 7 and 126 dead features at the end, by way of the switch to active entries.
    "standard": dict(l1_coefficient=0.6, use_ghost_grads=True, lr=1e-2, gradient_clip=1.0),
    "p_anneal": dict(l1_coefficient=0.2),
    "gated": dict(l1_coefficient=0.4),
    "topk": dict(k=8),
    "batchtopk": dict(k=8),
    "matryoshka": dict(k=8, matryoshka_widths=(128, 512, L)),
    "jumprelu": dict(l0_coefficient=0.1, pre_act_loss_coefficient=1e-3),
}


def options(architecture, dtype="float32", **more):
    fields = dict(
        total_steps=STEPS, lr_scheduler_name="constant", mse_normalization="sum",
        dead_feature_window=8, feature_sampling_window=25, compute_dtype=dtype,
        architecture=architecture,
    )  # fmt: skip
    return TrainingOptions(**({"lr": 3e-3} | fields | OWN[architecture] | more))


def trainer(device, chosen, seed=0):
    sae = initial_sae(
        D, L, seed=seed, b_dec=torch.zeros(D), dtype=torch.float32, architecture=ARCHITECTURES[
            chosen.architecture], options=chosen, encoder_init="decoder_transpose",
    )  # fmt: skip
    return SAETrainer(sae.to(device), chosen)


def batch(i, device):
    """Sums of a few of 256 directions each."""
    generator = torch.Generator().manual_seed(1000 + i)
    directions = torch.randn(256, D, generator=torch.Generator().manual_seed(7))
    directions /= directions.norm(dim=1, keepdim=True)
    which = torch.randint(256, (B, LIVELY), generator=generator)
    amounts = torch.rand(B, LIVELY, 1, generator=generator)
    return (directions[which] * amounts).sum(dim=1).to(device)


def trained(trainers, device, steps=range(STEPS)):
    """The metrics of the last step of each."""
    pack = PackStep()
    for i in steps:
        found = pack.step(trainers, batch(i, device), want_metrics=i == steps[-1])
        for t in trainers:
            if t.wants_rows:
                t.resample(batch(i, device), torch.ones(B))
    return found


def bits(t):
    tensors = {**t.sae.tensors, **t.state()[0]}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@pytest.mark.parametrize("architecture", OWN)
def test_a_gpu_learns_what_the_cpu_does(architecture):
    here, there = (trainer(d, options(architecture)) for d in ("cpu", "cuda"))
    start = {k: v.detach().clone() for k, v in here.sae.tensors.items()}
    # The same step in float32, summed in another order, which every step of Adam makes more of.
    (mine,), (theirs,) = (trained([t], t.sae.device, range(20)) for t in (here, there))
    assert architecture != "standard" or int(here.dead.sum()) > 400  # which are helped
    assert float(theirs.mse) == pytest.approx(float(mine.mse), rel=2e-2)
    assert float(theirs.l0) == pytest.approx(float(mine.l0), rel=2e-2)
    assert float(theirs.ghost) == pytest.approx(float(mine.ghost), rel=0.1, abs=1e-4)
    for name, began in start.items():
        moved = (getattr(here.sae, name) - began).norm()
        apart = (getattr(there.sae, name).cpu() - getattr(here.sae, name)).norm()
        assert float(apart) < 0.1 * float(moved), name


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16"])
@pytest.mark.parametrize("architecture", OWN)
def test_lower_precision_learns_as_well(architecture, dtype):
    exact, other = (trainer("cuda", options(architecture, d)) for d in ("float32", dtype))
    (one,), (two,) = trained([exact], "cuda"), trained([other], "cuda")
    assert float(two.mse) == pytest.approx(float(one.mse), rel=5e-2)
    assert float(two.l0) == pytest.approx(float(one.l0), rel=5e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", OWN)
def test_the_same_bits_again_and_from_a_checkpoint(architecture, dtype):
    more = dict(feature_sampling_method="anthropic")
    chosen = options(architecture, dtype, **(more if architecture == "standard" else {}))
    whole = [trainer("cuda", chosen, seed) for seed in (0, 1)]
    trained(whole, "cuda")
    if architecture == "standard":
        assert all(t.on_gpu and t.sparse and t.n_resampled for t in whole)
    first = [trainer("cuda", chosen, seed) for seed in (0, 1)]
    trained(first, "cuda", range(33))
    later = []
    for t in first:  # by way of the CPU, where files are read
        tensors, numbers = t.state()
        kept = {name: tensor.cpu() for name, tensor in tensors.items()}
        later.append(SAETrainer.resumed(t.sae, chosen, kept, numbers))
    trained(later, "cuda", range(33, STEPS))
    for one, two in zip(whole, later, strict=True):
        expected, found = bits(one), bits(two)
        assert expected.keys() == found.keys()
        assert [n for n in expected if not torch.equal(expected[n], found[n])] == []
    alone = trainer("cuda", chosen, 1)
    trained([alone], "cuda")
    expected, found = bits(whole[1]), bits(alone)
    assert [n for n in expected if not torch.equal(expected[n], found[n])] == []


def test_the_switch_to_active_entries_is_made_and_costs_nothing():
    chosen = options("standard", "float32", l1_coefficient=1.0)
    sparse, dense = trainer("cuda", chosen), trainer("cuda", chosen)
    sparse.active_share = 0.0  # from the first step on
    pack, without = PackStep(), PackStep(sparse=False)
    for i in range(10):
        (one,) = pack.step([sparse], batch(i, "cuda"), want_metrics=True)
        (two,) = without.step([dense], batch(i, "cuda"), want_metrics=True)
        assert float(one.overall) == pytest.approx(float(two.overall), rel=1e-3)
        assert float(one.l1) == pytest.approx(float(two.l1), rel=1e-3)
        assert sparse.on_gpu and sparse.sparse
    # Then the share decides: of ten active a row, 10 / 1536 is under a hundredth.
    active = float(one.l0) / L
    pack.step([sparse], batch(10, "cuda"))
    assert sparse.sparse == (active < 1 / 100)


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_step_has_the_bits_of_one_that_is_not(dtype, decoder_norm):
    """Through warm-up, decay, metrics, the switch, dead features and lists that grow."""
    more = dict(
        lr_scheduler_name="constantwithwarmup", lr_warm_up_steps=10, lr_decay_steps=10,
        l1_warm_up_steps=20, decoder_norm=decoder_norm, use_ghost_grads=False,
    )  # fmt: skip
    chosen = [
        options("standard", dtype, **more),
        options("standard", dtype, **more, l1_coefficient=3.0),
        options("standard", dtype, **more | {"use_ghost_grads": True}),
        options("standard", dtype, **more, target_l0=20.0),
    ]
    found = []
    for graphs in (True, False):
        pack = PackStep(graphs=graphs)
        saes = [trainer("cuda", o, seed) for seed, o in enumerate(chosen)]
        shares = []
        for i in range(STEPS):
            x = batch(i, "cuda")
            reads = [(x,), (x,), (x.flip(0),), (x,)]  # two hook points
            pack.step(saes, reads, want_metrics=i % 20 == 5)
            shares.append([t.active_share for t in saes])
        found.append((saes, shares, pack))
    (recorded, shares, pack), (eager, expected, _) = found
    assert pack.recorded.works
    assert len(pack.recorded.recorded) == len(chosen) and len(pack.recorded.batches) == 2
    assert shares == expected
    for one, two in zip(recorded, eager, strict=True):
        assert one.step == two.step == STEPS
        mine, theirs = bits(one), bits(two)
        assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []


def test_a_recorded_step_without_room_is_made_again(monkeypatch):
    monkeypatch.setattr(gpu_step, "FIRST_ENTRIES_PER_ROW", 1)
    chosen = options("standard", l1_coefficient=0.2)
    found = []
    for graphs in (True, False):
        pack, t = PackStep(graphs=graphs), trainer("cuda", chosen)
        t.sae.b_enc.fill_(-0.6)  # few are active; then many, from one step to the next
        t.active_share = 0.0
        for i in range(9):
            if i == 5:
                t.sae.b_enc.fill_(0.0)
            pack.step([t], batch(i, "cuda"))
        assert t.step == 9 and t.sparse and pack.recorded.works
        found.append(bits(t))
    assert [n for n in found[0] if not torch.equal(found[0][n], found[1][n])] == []
