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


def grid(**changes):
    """The fields of 3 L1 x 2 LR; `six` of conftest.py is its sweep."""
    six = fields(
        expansion_factor=4,
        lr=[1e-3, 3e-3],
        l1_coefficient=[3e-4, 1e-3, 3e-3],
        lr_warm_up_steps=4,
        training_tokens=64 * 1024,
        train_batch_size=2048,
        n_batches_in_buffer=8,
        b_dec_init_rows=512,
        eval_every=16,
        wandb_log_frequency=4,
        n_checkpoints=2,
        use_ghost_grads=True,
        log_to_wandb=True,
    )
    return six | changes


def tiny_fields():
    """Of a small sweep, one SAE, sixteen steps."""
    return fields(
        expansion_factor=2,
        lr=1e-3,
        l1_coefficient=1e-3,
        lr_warm_up_steps=4,
        training_tokens=16 * 1024,
        train_batch_size=1024,
        n_batches_in_buffer=4,
        b_dec_init_rows=256,
        eval_every=0,
        wandb_log_frequency=4,
    )
