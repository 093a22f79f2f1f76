"""saeray's figures of an SAE beside what sae_lens says of the same SAE, model and tokens.

    python benchmarks/evals.py                       # about two minutes on 2 cores
    python benchmarks/evals.py results/mine/trials/*/final
    python benchmarks/evals.py --exclude 0           # without rows of BOS

Trains a few SAEs on the bundled model (or takes those at its hook that are given), evaluates each
on 64 held-out windows of 128 tokens with saeray and with sae_lens's `run_evals` (in an environment
of its own, see peers.py), and prints the table of docs/metrics.md; its last column is the largest
difference of any SAE, relative to sae_lens's figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import MODEL, ROOT, environment
from quality_report import model_and_windows

HOOK = "blocks.2.hook_resid_pre"
HF_MODULE = "transformer.h.1"  # whose output is the same activation

# Ours, by wandb key -> theirs.
NAMES = {
    "metrics/explained_variance": "explained_variance",
    "metrics/explained_variance_per_token": "explained_variance_legacy",
    "metrics/cosine": "cossim",
    "metrics/l2_norm": "l2_norm_out",
    "metrics/l2_ratio": "l2_ratio",
    "metrics/relative_reconstruction_bias": "relative_reconstruction_bias",
    "metrics/l0": "l0",
    "metrics/l1": "l1",
    "metrics/ce_loss_without_sae": "ce_loss_without_sae",
    "metrics/ce_loss_with_sae": "ce_loss_with_sae",
    "metrics/ce_loss_with_ablation": "ce_loss_with_ablation",
    "metrics/CE_loss_score": "ce_loss_score",
    "metrics/kl_div_with_sae": "kl_div_with_sae",
    "metrics/kl_div_with_ablation": "kl_div_with_ablation",
    "metrics/kl_div_score": "kl_div_score",
}


def trained(folder: Path) -> list[Path]:
    """SAEs of three sparsities, briefly trained."""
    import saeray

    result = saeray.sweep(
        {
            "model_name": str(MODEL),
            "hook_point": HOOK,
            "dataset_path": str(MODEL / "text" / "train.parquet"),
            "context_size": 128,
            "expansion_factor": 4,
            "recipe": "sae_lens",
            "lr": 2e-3,
            "l1_coefficient": [0.7, 3.0, 12.0],
            "training_tokens": 200 * 1024,
            "train_batch_size": 1024,
            "store_batch_size": 16,
            "n_batches_in_buffer": 8,
            "eval_windows": 2,
            "eval_every": 0,
            "log_to_wandb": False,
            "device": "cpu",
        },
        name="evals",
        storage_path=folder,
        live=False,
    )
    if not result.ok:
        raise RuntimeError(f"not trained: {[row['error'] for row in result.rows]}")
    return [Path(row["path"]) for row in result.rows]


def ours(
    saes: Sequence[Path], n_windows: int, excluded: Sequence[int] = ()
) -> tuple[list[dict[str, Any]], Any]:
    """Figures of each SAE, and the windows [n, context] they are of, without some token ids."""
    import torch

    from saeray.files.checkpoint import load_sae
    from saeray.lm.evaluate import Evaluator

    model, windows = model_and_windows(MODEL, HOOK, n_windows)
    loaded = [load_sae(str(sae)) for sae in saes]
    served = ~torch.isin(windows, torch.tensor(excluded)) if excluded else None
    return Evaluator(model, windows, served).evaluate_all(loaded, (HOOK,), final=True), windows


def theirs(
    saes: Sequence[Path], windows: Any, folder: Path, excluded: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """The same by sae_lens: {"scalars": {name: figure}, "density": [L]} of each SAE."""
    import torch
    from safetensors.torch import save_file

    save_file({"tokens": windows.to(torch.int64)}, folder / "tokens.safetensors")
    settings = {
        "model": str(MODEL),
        "hf_module": HF_MODULE,
        "saes": [str(sae) for sae in saes],
        "tokens": str(folder / "tokens.safetensors"),
        "excluded": list(excluded),
    }
    script = str(ROOT / "benchmarks" / "peer_sae_lens_evals.py")
    done = subprocess.run(
        [str(environment("sae_lens")), script, json.dumps(settings)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"sae_lens's evaluation failed:\n{done.stderr[-3000:]}")
    found: list[dict[str, Any]] = json.loads(done.stdout.split("RESULT ")[1])
    return found


def table(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """Ours and theirs of each SAE, in Markdown."""
    each = "".join(f" ours, L0 {of['metrics/l0']:.0f} | theirs |" for of in mine)
    lines = [f"| saeray | sae_lens |{each} largest difference |"]
    lines.append("|---|---|" + "---|---|" * len(mine) + "---|")
    for key, name in NAMES.items():
        pairs = [(a[key], b["scalars"][name]) for a, b in zip(mine, other, strict=True)]
        apart = max(abs(a - b) / abs(b) for a, b in pairs)
        figures = " | ".join(f"{a:.5g} | {b:.5g}" for a, b in pairs)
        ours_is = key.replace("metrics/", "eval/")  # as logs have it
        lines.append(f"| `{ours_is}` | {name} | {figures} | {apart:.1e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("saes", type=Path, nargs="*", help="folders, at blocks.2.hook_resid_pre")
    parser.add_argument("--exclude", type=int, nargs="*", default=(), help="token ids")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        saes = [sae.resolve() for sae in arguments.saes] or trained(Path(folder))
        excluded = arguments.exclude
        mine, windows = ours(saes, 64, excluded)
        print(table(mine, theirs(saes, windows, Path(folder), excluded)))


if __name__ == "__main__":
    main()
