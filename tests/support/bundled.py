"""Where the bundled model lies, and the repository; the fields of sweeps on it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "saeray" / "models" / "tiny-python"
HOOK = "blocks.2.hook_resid_pre"


def fields(**of_the_sweep):
    """What all sweeps on the bundled model have in common, and what this one has."""
    return (
        dict(
            model_name=str(MODEL),
            hook_point=HOOK,
            dataset_path=str(MODEL / "text" / "train.parquet"),
            context_size=64,
            store_batch_size=16,
            eval_windows=8,
            log_to_wandb=False,
            device="cpu",
            seed=7,
        )
        | of_the_sweep
    )
