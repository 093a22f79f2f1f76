"""Fixtures: the bundled model and text, and one Ray instance for all tests of a file."""

import os
from pathlib import Path

import pytest

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("WANDB_SILENT", "true")

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "saeray" / "models" / "tiny-python"
HOOK = "blocks.2.hook_resid_pre"


@pytest.fixture
def tiny():
    """The fields of a small sweep on the bundled model; a copy for each test."""
    return dict(
        model_name=str(MODEL),
        hook_point=HOOK,
        dataset_path=str(MODEL / "text" / "train.parquet"),
        context_size=64,
        expansion_factor=2,
        lr=1e-3,
        l1_coefficient=1e-3,
        lr_warm_up_steps=4,
        training_tokens=16 * 1024,
        train_batch_size=1024,
        store_batch_size=16,
        n_batches_in_buffer=4,
        b_dec_init_rows=256,
        eval_windows=8,
        eval_every=0,
        wandb_log_frequency=4,
        log_to_wandb=False,
        device="cpu",
        seed=7,
    )


@pytest.fixture(scope="module")
def ray_instance():
    """Ray on this machine, shared. What a test leaves behind there, the next one would see."""
    from saeray.runner import start_ray

    assert start_ray(None)
    import ray

    yield ray
    ray.shutdown()
