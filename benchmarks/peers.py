"""The same eight SAEs with saeray, sae_lens and dictionary_learning, one after the other.

    make bench                                   # or: python benchmarks/peers.py --rounds 3

Eight L1 coefficients, d_in 128, batch 4096, 1M tokens each, on the bundled model and text, at d_sae
1024 and 4096. Each system harvests for itself, on the CPU, in its own process; nothing else should
run on the machine. The peers get environments of their own beside the project's (`.venv-sae-lens`,
`.venv-dictionary-learning`), made at the first run. saeray trains with sae_lens's loss (recipe:
sae_lens) in float32, and once more with compute_dtype: bfloat16. All minimise the summed squared
error plus the same coefficients times the L1, so they are about as sparse at every step.

Prints medians of the rounds: SAE-tokens/s (harvesting included) in the first fifth of the training,
when most features are active, and in its last two fifths, when few are; wall time of the whole
command; and the largest memory of its process tree (proportional set size, asked every second).
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
from typing import Any, NamedTuple

import psutil

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
    "tokens": 1024 * 1024,
    "store_batch_size": 32,
    "n_batches_in_buffer": 16,
    "lr": 2e-3,  # best of 1e-3, 2e-3 and 4e-3 for saeray and sae_lens: docs/quality.md
    "l1": [2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 1.4e-3, 2e-3, 3e-3],
    "mean_norm": 21.5,  # E‖x - mean‖ at the hook, to convert L1 coefficients
}

# dictionary_learning pins none of what it needs; with a newer nnsight, transformers or datasets it
# does not import. --no-deps keeps torchvision out, which would replace torch.
PEERS = {
    "sae_lens": [["sae-lens==6.54.12"]],
    # For tests alone. Of what it asks for the rest is for models that we do not have.
    "sae_dashboard": [
        ["sae-lens==6.54.12", "dataclasses-json==0.6.7", "matplotlib==3.10.1"],
        ["--no-deps", "sae-dashboard==0.8.0", "eindex-callum==0.1.2"],
    ],
    "dictionary_learning": [
        ["--no-deps", "dictionary-learning==0.1.0", "nnsight==0.3.7"],
        [
            "transformers==4.46.3", "datasets==3.6.0", "accelerate", "circuitsvis", "diffusers",
            "einops", "llvmlite", "pandas", "plotly", "protobuf", "pydantic", "python-socketio",
            "sentencepiece", "tqdm", "umap-learn", "wandb", "zstandard", "websocket-client",
        ],
    ],
    "sparsify": [["eai-sparsify==1.3.3"]],
}  # fmt: skip
TIMED = ("sae_lens", "dictionary_learning")


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


class Run(NamedTuple):
    """One system, once."""

    first: float  # SAE-tokens/s in the first fifth
    last: float  # SAE-tokens/s in the last two fifths
    wall_s: float
    memory_gb: float


def run(system: str, d_sae: int) -> Run:
    if system.startswith("saeray"):
        return run_saeray(d_sae, "bfloat16" if system.endswith("bfloat16") else "float32")
    settings = json.dumps(SETTINGS | {"d_sae": d_sae})
    script = ROOT / "benchmarks" / f"peer_{system}.py"
    output, wall, memory = watched([str(environment(system)), str(script), settings])
    (line,) = [x for x in output.splitlines() if x.startswith("RESULT ")]
    seconds = json.loads(line[7:])["step_seconds"]
    ends = {(i + 1) * SETTINGS["batch"]: s for i, s in enumerate(seconds)}
    return Run(*phases(ends), wall, memory)


def run_saeray(d_sae: int, compute_dtype: str) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        to_sum = SETTINGS["d_in"] * SETTINGS["mean_norm"]
        sweep = {
            "recipe": "sae_lens",
            "model_name": SETTINGS["model"],
            "hook_point": "blocks.2.hook_resid_pre",
            "dataset_path": SETTINGS["dataset"],
            "context_size": SETTINGS["context_size"],
            "expansion_factor": d_sae // SETTINGS["d_in"],
            "l1_coefficient": [x * to_sum for x in SETTINGS["l1"]],
            "lr": SETTINGS["lr"],
            "compute_dtype": compute_dtype,
            "training_tokens": SETTINGS["tokens"],
            "train_batch_size": SETTINGS["batch"],
            "store_batch_size": SETTINGS["store_batch_size"],
            "n_batches_in_buffer": SETTINGS["n_batches_in_buffer"],
            "wandb_log_frequency": SETTINGS["tokens"] // SETTINGS["batch"] // 20,
            "eval_windows": 16,
            "eval_every": 0,
            "log_to_wandb": False,
            "device": "cpu",
            "storage_path": folder,
        }
        file = Path(folder) / "bench.yaml"
        file.write_text(json.dumps(sweep))  # JSON is YAML
        command = [sys.executable, "-m", "saeray", "sweep", str(file), "--name", "bench"]
        _, wall, memory = watched(command)
        ends: dict[int, float] = {}
        logs = list((Path(folder) / "bench" / "trials").glob("*/metrics.jsonl"))
        assert len(logs) == len(SETTINGS["l1"])
        for log in logs:
            for line in map(json.loads, log.read_text().splitlines()):
                tokens, end = (
                    line[f"details/{k}"] for k in ("n_training_tokens", "training_seconds")
                )
                ends[tokens] = max(end, ends.get(tokens, 0.0))
        return Run(*phases(ends), wall, memory)


def phases(ends: dict[int, float]) -> tuple[float, float]:
    """SAE-tokens/s in the first fifth and in the last two; seconds at which tokens were done."""
    ends = {0: 0.0} | ends
    total = max(ends)
    assert total >= SETTINGS["tokens"] - SETTINGS["batch"]

    def at(tokens: float) -> tuple[int, float]:
        nearest = min(ends, key=lambda t: abs(t - tokens))
        return nearest, ends[nearest]

    def rate(a: tuple[int, float], b: tuple[int, float]) -> float:
        return len(SETTINGS["l1"]) * (b[0] - a[0]) / (b[1] - a[1])

    return rate(at(0), at(total / 5)), rate(at(total * 3 / 5), at(total))


def watched(command: list[str]) -> tuple[str, float, float]:
    """A command's output, seconds, and its process tree's largest memory in GB."""
    started, most = time.time(), 0.0
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen(
            command, stdout=output, stderr=subprocess.STDOUT,
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        )  # fmt: skip
        while process.poll() is None:
            most = max(most, memory_of(process))
            time.sleep(1)
        wall = time.time() - started
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{text[-5000:]}")
    return text, wall, most


def memory_of(process: psutil.Process) -> float:
    total = 0
    for p in [process, *process.children(recursive=True)]:
        try:
            total += p.memory_full_info().pss
        except psutil.Error:  # it has ended
            pass
    return total / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1, help="medians over this many")
    parser.add_argument("--d-sae", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, default=SETTINGS["tokens"])
    parser.add_argument("--only", nargs="+", default=["saeray", "saeray bfloat16", *TIMED])
    arguments = parser.parse_args()
    SETTINGS["tokens"] = arguments.tokens
    for peer in set(arguments.only) & set(PEERS):
        environment(peer)
    print(f"{len(SETTINGS['l1'])} SAEs x {SETTINGS['tokens']:,} tokens, {os.cpu_count()} cores")
    for d_sae in arguments.d_sae:
        runs: dict[str, list[Run]] = {}
        for _ in range(arguments.rounds):  # in turn, so drift of the machine hits all alike
            for system in arguments.only:
                one = run(system, d_sae)
                print(f"  d_sae {d_sae}, {system}: {one}", flush=True)
                runs.setdefault(system, []).append(one)
        medians = {
            system: Run(*(statistics.median(figure) for figure in zip(*of, strict=True)))
            for system, of in runs.items()
        }
        print(f"\n| d_sae {d_sae} | first fifth | last two fifths | wall s | memory GB |")
        print("|---|---|---|---|---|")
        for system, m in medians.items():
            figures = f"{m.first:,.0f} | {m.last:,.0f} | {m.wall_s:.0f} | {m.memory_gb:.1f}"
            print(f"| {system} | {figures} |")
        peers = [m for s, m in medians.items() if s in PEERS]
        for system in [s for s in medians if s not in PEERS and peers]:
            mine = medians[system]
            print(
                f"| {system} / better peer | {mine.first / max(m.first for m in peers):.2f} x "
                f"| {mine.last / max(m.last for m in peers):.2f} x "
                f"| {mine.wall_s / min(m.wall_s for m in peers):.2f} x "
                f"| {mine.memory_gb / min(m.memory_gb for m in peers):.2f} x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
