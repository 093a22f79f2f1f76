"""The same eight SAEs with saeray, sae_lens and dictionary_learning, one after the other.

    make bench                                   # or: python benchmarks/peers.py --rounds 3

Eight L1 coefficients at one learning rate, d_in 128, batch 4096, 512k tokens each, on the bundled
model and text, at d_sae 1024 and 4096. Each system harvests for itself, on the CPU, in its own
process; nothing else should run on the machine. The peers get environments of their own beside the
project's (`.venv-sae-lens`, `.venv-dictionary-learning`), made at the first run.

Prints SAE-tokens/s during training (harvesting included, start-up not) and the wall time of the
whole command. saeray's training time runs from its pack's first batch to its last step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "saeray" / "models" / "tiny-python"
TORCH = "torch==2.13.0"

SETTINGS: dict[str, Any] = {
    "model": str(MODEL),
    "dataset": str(MODEL / "text" / "train.parquet"),
    "dataset_folder": str(MODEL / "text"),
    "d_in": 128,
    "batch": 4096,
    "context_size": 128,
    "tokens": 512 * 1024,
    "store_batch_size": 32,
    "n_batches_in_buffer": 16,
    "lr": 1e-3,
    "l1": [2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 3e-3],
    "mean_norm": 21.5,  # E‖x - mean‖ at the hook, to convert L1 coefficients
}

# dictionary_learning pins none of what it needs; with a newer nnsight, transformers or datasets it
# does not import. --no-deps keeps torchvision out, which would replace torch.
PEERS = {
    "sae_lens": [["sae-lens==6.54.12"]],
    "dictionary_learning": [
        ["--no-deps", "dictionary-learning==0.1.0", "nnsight==0.3.7"],
        [
            "transformers==4.46.3", "datasets==3.6.0", "accelerate", "circuitsvis", "diffusers",
            "einops", "llvmlite", "pandas", "plotly", "protobuf", "pydantic", "python-socketio",
            "sentencepiece", "tqdm", "umap-learn", "wandb", "zstandard", "websocket-client",
        ],
    ],
}  # fmt: skip


def environment(peer: str) -> Path:
    """The python of a peer's own environment, made if it is not there."""
    folder = ROOT / f".venv-{peer.replace('_', '-')}"
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        print(f"making {folder.name} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH], check=True)
        for packages in PEERS[peer]:
            subprocess.run([*pip, *packages], check=True)
        (folder / ".installed").touch()
    return python


def run_peer(peer: str, d_sae: int) -> dict[str, float]:
    command = [
        str(environment(peer)),
        str(ROOT / "benchmarks" / f"peer_{peer}.py"),
        json.dumps(SETTINGS | {"d_sae": d_sae}),
    ]
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    wall = time.time() - started
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{peer} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return {"training_s": json.loads(lines[-1][7:])["training_s"], "wall_s": wall}


def run_saeray(d_sae: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        sweep = {
            "model_name": SETTINGS["model"],
            "hook_point": "blocks.2.hook_resid_pre",
            "dataset_path": SETTINGS["dataset"],
            "context_size": SETTINGS["context_size"],
            "expansion_factor": d_sae // SETTINGS["d_in"],
            "l1_coefficient": SETTINGS["l1"],
            "lr": SETTINGS["lr"],
            "lr_warm_up_steps": 10,
            "training_tokens": SETTINGS["tokens"],
            "train_batch_size": SETTINGS["batch"],
            "store_batch_size": SETTINGS["store_batch_size"],
            "n_batches_in_buffer": SETTINGS["n_batches_in_buffer"],
            "eval_windows": 16,
            "eval_every": 0,
            "log_to_wandb": False,
            "device": "cpu",
            "storage_path": folder,
        }
        file = Path(folder) / "bench.yaml"
        file.write_text(json.dumps(sweep))  # JSON is YAML
        started = time.time()
        done = subprocess.run(
            [sys.executable, "-m", "saeray", "sweep", str(file), "--name", "bench"],
            capture_output=True,
            text=True,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        )
        wall = time.time() - started
        if done.returncode:
            raise RuntimeError(f"saeray failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        seconds = []
        for log in (Path(folder) / "bench" / "trials").glob("*/metrics.jsonl"):
            last = json.loads(log.read_text().splitlines()[-1])
            assert last["details/n_training_tokens"] == SETTINGS["tokens"]
            seconds.append(last["details/training_seconds"])
        assert len(seconds) == len(SETTINGS["l1"])
        return {"training_s": max(seconds), "wall_s": wall}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="medians over this many")
    parser.add_argument("--d-sae", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--only", nargs="+", default=["saeray", *PEERS])
    arguments = parser.parse_args()
    for peer in set(arguments.only) & set(PEERS):
        environment(peer)
    n = len(SETTINGS["l1"]) * SETTINGS["tokens"]
    print(f"{len(SETTINGS['l1'])} SAEs x {SETTINGS['tokens']:,} tokens, {os.cpu_count()} cores")
    for d_sae in arguments.d_sae:
        results: dict[str, list[dict[str, float]]] = {}
        for _ in range(arguments.rounds):  # in turn, so drift of the machine hits all alike
            for system in arguments.only:
                result = run_saeray(d_sae) if system == "saeray" else run_peer(system, d_sae)
                results.setdefault(system, []).append(result)
        rates = {s: n / statistics.median(r["training_s"] for r in v) for s, v in results.items()}
        print(f"d_sae {d_sae}")
        for system, runs in results.items():
            wall = statistics.median(r["wall_s"] for r in runs)
            print(f"  {system:<22} {rates[system]:>10,.0f} SAE-tokens/s   {wall:>7.1f} s wall")
        others = [r for s, r in rates.items() if s != "saeray"]
        if "saeray" in rates and others:
            print(f"  saeray / better peer during training: {rates['saeray'] / max(others):.2f}x")


if __name__ == "__main__":
    main()
