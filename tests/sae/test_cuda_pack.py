"""`PackStep` with the GPU's kernels, in Triton's interpreter: the same SAEs as without them."""

import os
import subprocess
import sys

import pytest
import torch

from saeray.sae import cuda_step, trainer
from saeray.sae.architectures.base import PARAMETERS
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
B, L, D = 33, 35, 12


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
    monkeypatch.setattr(cuda_step, "N_WORKERS", 2)
    monkeypatch.setattr(trainer, "STEPS_PER_DECISION", 2)
    options = TrainingOptions(
        lr=1e-2, l1_coefficient=1e-2, total_steps=100, lr_scheduler_name="constant",
        decoder_norm=decoder_norm, gradient_clip=0.1 if decoder_norm == "free" else 0.0,
        use_ghost_grads=decoder_norm == "unit", dead_feature_window=1,
    )  # fmt: skip

    def trained(on_gpu):
        monkeypatch.setattr(cuda_step, "available", lambda device: on_gpu)
        sae = initial_sae(D, L, seed=0, b_dec=torch.zeros(D), dtype=torch.float32)
        sae.b_enc.fill_(-1.5)
        monkeypatch.setattr(trainer, "SPARSE_BELOW_ON_GPU", 0.5)
        t, step, seen = SAETrainer(sae, options), PackStep(sparse=on_gpu), []
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
