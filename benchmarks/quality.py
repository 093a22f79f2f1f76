"""FVU and CE loss score over L0: saeray's recipes beside sae_lens, judged by one evaluator.

    python benchmarks/quality.py --output quality/bundled
    python benchmarks/quality.py --output quality/second --model second
    python benchmarks/quality.py --output quality/seeds --seeds 0 1 2 --lr 2e-3 --l1 1.5 3 6 \
        --systems "sae_lens 6.54.12" "recipe sae_lens"
    python benchmarks/quality.py --output quality/look --tokens 200000 --lr 2e-3     # a quick look

Each system trains the same grid of learning rates and L1 coefficients on the same model, text,
width and number of tokens. Coefficients are given in the unit of the summed squared error; where a
system has the guide's loss they are divided by d_in and the mean norm of centred activations, which
makes them count as much. All SAEs are then loaded and evaluated by saeray on text that none was
trained on. A seed stands for initial weights, the order of rows and which documents are read.

sae_lens gets an environment of its own (`.venv-sae-lens`, see peers.py), and the second model is
made at its first use (`.second-model`, see second_model.py).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import quality_report
from peers import MODEL, ROOT, SETTINGS, environment
from second_model import D_MODEL, second_model

LR = [1e-3, 2e-3, 4e-3]
BATCH = 1024
EXPANSION = 8
CONTEXT = SETTINGS["context_size"]


class Subject(NamedTuple):
    """A language model with its text and the place where SAEs are trained."""

    folder: Callable[[], Path]
    d_in: int
    hook: str
    hf_module: str  # whose output is the same activation
    l1: list[float]  # coefficients from about L0 100 to 5


SUBJECTS = {
    "bundled": Subject(
        lambda: MODEL, 128, "blocks.2.hook_resid_pre", "transformer.h.1", [0.7, 1.5, 3.0, 6.0, 12.0]
    ),
    "second": Subject(
        second_model,
        D_MODEL,
        "blocks.1.hook_resid_pre",
        "transformer.h.0",
        [0.3, 0.65, 1.3, 2.6, 5.2],  # its activations are half as long
    ),
}

# Fields of a system's config; steps below 1 are a share of the training's.
SCHEDULES = {"l1_warm_up_steps": 0.05, "lr_decay_steps": 0.2}
SYSTEMS: dict[str, dict[str, Any]] = {
    "sae_lens 6.54.12": {},
    "sae_lens 6.54.12, schedules": SCHEDULES,
    "recipe guide": {"recipe": "guide"},
    "recipe sae_lens": {"recipe": "sae_lens"},
    "recipe guide, constant lr": {"recipe": "guide", "lr_decay_steps": 0},
    "recipe sae_lens, schedules": {"recipe": "sae_lens", **SCHEDULES},
    "recipe guide-2024": {"recipe": "guide-2024"},
    "recipe anthropic-april": {"recipe": "anthropic-april"},
}
DEFAULT = [
    "sae_lens 6.54.12",
    "sae_lens 6.54.12, schedules",
    "recipe guide",
    "recipe guide, constant lr",
]


class Sae(NamedTuple):
    system: str
    seed: int
    lr: float
    l1: float  # in the unit of the summed squared error
    folder: Path


class Benchmark:
    """What all systems are given, and where their SAEs are kept."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.subject = SUBJECTS[arguments.model]
        self.model = self.subject.folder()
        self.mean_norm = quality_report.mean_centred_norm(self.model, self.subject.hook)

    def trained(self, system: str, seed: int) -> list[Sae]:
        """A system's SAEs of one seed; trains them if they are not there."""
        folder = self.arguments.output / f"{system} seed {seed}"
        ours = system.startswith("recipe")
        if not (folder / "complete").exists():
            folder.mkdir(parents=True, exist_ok=True)
            steps = self.arguments.tokens // BATCH
            fields = {
                k: int(v * steps) if k.endswith("_steps") and v < 1 else v
                for k, v in SYSTEMS[system].items()
            }
            print(f"{system}, seed {seed} …", flush=True)
            (self.train_saeray if ours else self.train_sae_lens)(fields, seed, folder)
            (folder / "complete").touch()
        if not ours:
            return [
                Sae(system, seed, lr, l1, folder / f"lr={lr:g}" / f"l1={l1:g}")
                for lr in self.arguments.lr
                for l1 in self.arguments.l1
            ]
        found = []
        for row in csv.DictReader((folder / "saes" / "results.csv").open()):
            given = float(row["l1_coefficient"]) * self.unit(SYSTEMS[system]["recipe"])
            l1 = min(self.arguments.l1, key=lambda x: abs(x - given))
            found.append(Sae(system, seed, float(row["lr"]), l1, folder / "saes" / row["path"]))
        return found

    def unit(self, recipe: str) -> float:
        """What a coefficient of the recipe's loss counts in that of the summed error."""
        return self.subject.d_in * self.mean_norm if recipe.startswith("guide") else 1.0

    def train_saeray(self, fields: dict[str, Any], seed: int, folder: Path) -> None:
        sweep = {
            "model_name": str(self.model),
            "hook_point": self.subject.hook,
            "dataset_path": str(self.model / "text" / "train.parquet"),
            "context_size": CONTEXT,
            "expansion_factor": EXPANSION,
            "l1_coefficient": [x / self.unit(fields["recipe"]) for x in self.arguments.l1],
            "lr": self.arguments.lr,
            "seed": seed,
            "training_tokens": self.arguments.tokens,
            "train_batch_size": BATCH,
            "store_batch_size": SETTINGS["store_batch_size"],
            "n_batches_in_buffer": SETTINGS["n_batches_in_buffer"],
            "eval_windows": 8,
            "eval_every": 0,
            "log_to_wandb": False,
            "device": "cpu",
            "storage_path": str(folder),
            **fields,
        }
        file = folder / "sweep.yaml"
        file.write_text(json.dumps(sweep))  # JSON is YAML
        command = [sys.executable, "-m", "saeray", "sweep", str(file), "--name", "saes"]
        env = os.environ | {"RAY_AUTH_MODE": "disabled"}
        run(command, folder / "log.txt", env)

    def train_sae_lens(self, fields: dict[str, Any], seed: int, folder: Path) -> None:
        for lr in self.arguments.lr:
            settings = SETTINGS | {
                "model": str(self.model),
                "dataset_folder": str(shuffled_text(self.model, seed, self.arguments.output)),
                "hf_module": self.subject.hf_module,
                "d_in": self.subject.d_in,
                "d_sae": EXPANSION * self.subject.d_in,
                "l1_of_sum": self.arguments.l1,
                "lr": lr,
                "seed": seed,
                "tokens": self.arguments.tokens,
                "batch": BATCH,
                "output": str(folder / f"lr={lr:g}"),
                **fields,
            }
            script = str(ROOT / "benchmarks" / "peer_sae_lens.py")
            command = [str(environment("sae_lens")), script, json.dumps(settings)]
            run(command, folder / "log.txt")


def run(command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
    with log.open("a") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    if done.returncode:
        raise RuntimeError(f"{command[:4]} failed: see {log}")


def shuffled_text(model: Path, seed: int, output: Path) -> Path:
    """The training text with its documents in a seed's order: sae_lens reads them as they come."""
    import numpy as np
    import pyarrow.parquet as pq

    folder = output / f"text {seed}"
    if not (folder / "train.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        table = pq.read_table(model / "text" / "train.parquet")
        order = np.random.default_rng(seed).permutation(len(table))
        pq.write_table(table.take(order), folder / "train.parquet")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="SAEs are kept there")
    parser.add_argument("--model", choices=SUBJECTS, default="bundled")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=DEFAULT)
    parser.add_argument("--lr", type=float, nargs="+", default=LR)
    parser.add_argument("--l1", type=float, nargs="+", help="default: the model's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    arguments.l1 = arguments.l1 or SUBJECTS[arguments.model].l1
    benchmark = Benchmark(arguments)
    saes = []
    for seed in arguments.seeds:
        for system in arguments.systems:
            saes += benchmark.trained(system, seed)
    rows = quality_report.judged(saes, benchmark.model, benchmark.subject.hook)
    text = quality_report.report(rows, arguments.output)
    (arguments.output / "quality.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
