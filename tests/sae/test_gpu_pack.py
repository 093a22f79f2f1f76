"""`PackStep` with the GPU's kernels, in Triton's interpreter: the same SAEs as without them."""

import os
import subprocess
import sys

import pytest
import torch

from saeray.sae import trainer
from saeray.sae.architectures.base import PARAMETERS
from saeray.sae.gpu import graphs
from saeray.sae.gpu import sparse_step as gpu_step
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
B, L, D = 33, 35, 12
FEW = 13  # features, where many steps are made: interpreted, every row and feature costs 25 ms


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreted tests")
@pytest.mark.slow
@pytest.mark.ci
def test_a_pack_in_tritons_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | dict(TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]


@pytest.mark.skipif(not INTERPRETED, reason="by test_a_pack_in_tritons_interpreter")
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_a_pack_steps_through_the_switch_as_without_triton(monkeypatch, decoder_norm):
    monkeypatch.setattr(gpu_step, "N_WORKERS", 2)
    monkeypatch.setattr(trainer, "STEPS_PER_DECISION", 2)
    options = TrainingOptions(
        lr=1e-2, l1_coefficient=1e-2, total_steps=100, lr_scheduler_name="constant",
        decoder_norm=decoder_norm, gradient_clip=0.1 if decoder_norm == "free" else 0.0,
        use_ghost_grads=decoder_norm == "unit", dead_feature_window=1,
    )  # fmt: skip

    def trained(on_gpu):
        monkeypatch.setattr(gpu_step, "available", lambda device: on_gpu)
        sae = initial_sae(D, L, seed=0, b_dec=torch.zeros(D), dtype=torch.float32)
        sae.b_enc.fill_(-1.5)
        monkeypatch.setitem(trainer.SPARSE_BELOW_ON_GPU, "float32", 0.5)
        monkeypatch.setattr(trainer, "SPARSE_ROWS_ON_GPU", 1)
        t, step, seen = SAETrainer(sae, options), PackStep(sparse=on_gpu, graphs=False), []
        for i in range(4):
            x = torch.randn(B, D, generator=torch.Generator().manual_seed(i))
            (metrics,) = step.step([t], x, want_metrics=True)
            seen.append((t.sparse, float(metrics.overall), float(metrics.l1), float(metrics.l0)))
        return t, seen

    mine, seen = trained(on_gpu=True)
    theirs, expected = trained(on_gpu=False)
    assert [sparse for sparse, *_ in seen] == [False, False, True, True]
    for (_, *got), (_, *wanted) in zip(seen, expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-4)
    for k in PARAMETERS:
        torch.testing.assert_close(
            getattr(mine.sae, k), getattr(theirs.sae, k), rtol=1e-3, atol=2e-4
        )
    tensors, numbers = mine.state()
    resumed = SAETrainer.resumed(mine.sae, options, tensors, numbers)
    assert resumed.state()[0].keys() == tensors.keys()


class FakeGraph:
    """Whose kernels run when they are launched, and know that they are of a graph."""

    def __init__(self, step, place):
        self.step = step

    def __call__(self):
        FakeGraph.running = True
        try:
            self.step()
        finally:
            FakeGraph.running = False
        FakeGraph.launched += 1

    running, launched = False, 0


@pytest.mark.skipif(not INTERPRETED, reason="by test_a_pack_in_tritons_interpreter")
def test_recorded_steps_are_those_that_are_not(monkeypatch):
    """What the host does around CUDA graphs; test_on_a_gpu.py has the graphs themselves."""
    monkeypatch.setattr(gpu_step, "N_WORKERS", 2)
    monkeypatch.setattr(gpu_step, "FIRST_ENTRIES_PER_ROW", 1)  # so there is no room at first
    monkeypatch.setattr(gpu_step, "available", lambda device: True)
    monkeypatch.setattr(gpu_step, "recording", lambda: FakeGraph.running)
    monkeypatch.setattr(graphs, "record", FakeGraph)
    monkeypatch.setattr(trainer, "STEPS_PER_DECISION", 2)
    monkeypatch.setitem(trainer.SPARSE_BELOW_ON_GPU, "float32", 0.5)
    monkeypatch.setattr(trainer, "SPARSE_ROWS_ON_GPU", 1)
    fields = dict(
        lr=1e-2, total_steps=100, lr_warm_up_steps=4, l1_warm_up_steps=4, dead_feature_window=2,
        decoder_norm="free", feature_sampling_window=3,
    )  # fmt: skip
    of_each = [
        TrainingOptions(**fields, l1_coefficient=1e-2, target_l0=3.0),
        TrainingOptions(**fields, l1_coefficient=1e-2, use_ghost_grads=True),
    ]

    def trained(graphs):
        FakeGraph.launched, saes = 0, []
        for options in of_each:
            sae = initial_sae(D, FEW, seed=0, b_dec=torch.zeros(D), dtype=torch.float32)
            sae.b_enc.fill_(-1.5)
            saes.append(SAETrainer(sae, options))
        pack, decisions = PackStep(graphs=graphs), []
        for i in range(9):
            if i == 6:  # many are active all of a sudden
                saes[0].sae.b_enc.fill_(-0.5)
            x = torch.randn(11, D, generator=torch.Generator().manual_seed(i))
            x = x[:7] if i in (5, 8) else x  # of another size, as a calibration has them
            pack.step(saes, [(x,), (x.flip(0),)], want_metrics=i == 4)
            decisions.append(
                [
                    (
                        t.step,
                        t.sparse,
                        t.active_share,
                        t.lr,
                        t.coefficient,
                        t.adam.param_groups[0]["lr"],
                    )
                    for t in saes
                ]
            )
        return saes, decisions, FakeGraph.launched

    recorded, decisions, launched = trained(graphs=True)
    eager, expected, none = trained(graphs=False)
    # Each SAE's first two of both ways aren't, nor is the one with metrics, nor are those in which
    # features are dead; and one is launched that has no room.
    assert none == 0 and 6 <= launched <= 12
    assert decisions == expected
    for one, two in zip(recorded, eager, strict=True):
        mine, theirs = ({**t.sae.tensors, **t.state()[0]} for t in (one, two))
        assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []


@pytest.mark.skipif(not INTERPRETED, reason="by test_a_pack_in_tritons_interpreter")
def test_where_graphs_cannot_be_recorded_steps_are_made_without(monkeypatch):
    def record(step, place):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(gpu_step, "available", lambda device: True)
    monkeypatch.setattr(graphs, "record", record)
    sae = initial_sae(D, L, seed=0, b_dec=torch.zeros(D), dtype=torch.float32)
    t, pack = SAETrainer(sae, TrainingOptions(lr=1e-3, total_steps=9)), PackStep()
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="CUDA graphs can't be used.*out of memory"):
        for _ in range(3):
            pack.step([t], x)
    assert t.step == 3
