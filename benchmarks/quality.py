"""FVU and CE loss score over L0: saeray's recipes beside sae_lens, judged by one evaluator.

    python benchmarks/quality.py --output quality          # on 2 cores about half an hour
    python benchmarks/quality.py --output quality --tokens 200000 --lr 2e-3    # a quick look

Each system trains the same grid of learning rates and L1 coefficients on the same model, text,
width and number of tokens. Coefficients are given in the unit of the summed squared error; where a
recipe has the guide's loss they are divided by d_in and the mean norm of centred activations, which
makes them count as much. All SAEs are then loaded and evaluated by saeray on text that none was
trained on.

sae_lens gets an environment of its own (`.venv-sae-lens`, see peers.py).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import MODEL, ROOT, SETTINGS, environment

PEER = "sae_lens 6.54.12"
RECIPES = ["guide", "guide-2024", "sae_lens", "anthropic-april"]
HOOK = "blocks.2.hook_resid_pre"
L1 = [0.7, 1.5, 3.0, 6.0, 12.0]
LR = [1e-3, 2e-3, 4e-3]
BATCH = 1024
GUIDES_UNIT = SETTINGS["d_in"] * SETTINGS["mean_norm"]
COLUMNS = ("system", "lr", "l1", "l0", "fvu", "ce_loss_score", "never_fired")


def train_saeray(recipe: str, arguments: argparse.Namespace, folder: Path) -> None:
    """A sweep with one recipe; `recipe` may set fields: guide,l1_warm_up_steps=50."""
    name, *settings = recipe.split(",")
    guides = name.startswith("guide")
    sweep = {
        "recipe": name,
        "model_name": str(MODEL),
        "hook_point": HOOK,
        "dataset_path": SETTINGS["dataset"],
        "context_size": SETTINGS["context_size"],
        "expansion_factor": arguments.d_sae // SETTINGS["d_in"],
        "l1_coefficient": [x / GUIDES_UNIT if guides else x for x in arguments.l1],
        "lr": arguments.lr,
        "training_tokens": arguments.tokens,
        "train_batch_size": BATCH,
        "store_batch_size": SETTINGS["store_batch_size"],
        "n_batches_in_buffer": SETTINGS["n_batches_in_buffer"],
        "eval_windows": 8,
        "eval_every": 0,
        "log_to_wandb": False,
        "device": "cpu",
        "storage_path": str(folder),
    }
    file = folder / "sweep.yaml"
    file.write_text(json.dumps(sweep))  # JSON is YAML
    command = [sys.executable, "-m", "saeray", "sweep", str(file), "--name", "saes"]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, env=os.environ | {"RAY_AUTH_MODE": "disabled"})


def train_sae_lens(arguments: argparse.Namespace, folder: Path) -> None:
    for lr in arguments.lr:
        settings = SETTINGS | {
            "d_sae": arguments.d_sae,
            "l1_of_sum": arguments.l1,
            "lr": lr,
            "tokens": arguments.tokens,
            "batch": BATCH,
            "output": str(folder / f"lr={lr:g}"),
        }
        script = str(ROOT / "benchmarks" / "peer_sae_lens.py")
        command = [str(environment("sae_lens")), script, json.dumps(settings)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def trained(system: str, arguments: argparse.Namespace) -> list[tuple[float, float, Path]]:
    """(lr, L1 coefficient as given, folder) of each SAE; trains them if they are not there."""
    folder = arguments.output / system
    found = []
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if system == PEER:
            train_sae_lens(arguments, folder)
        else:
            train_saeray(system.removeprefix("recipe "), arguments, folder)
        (folder / "complete").touch()
    if system == PEER:
        for lr in arguments.lr:
            found += [(lr, l1, folder / f"lr={lr:g}" / f"l1={l1:g}") for l1 in arguments.l1]
        return found
    unit = GUIDES_UNIT if system.startswith("recipe guide") else 1.0
    for row in csv.DictReader((folder / "saes" / "results.csv").open()):
        l1 = min(arguments.l1, key=lambda x: abs(x - float(row["l1_coefficient"]) * unit))
        found.append((float(row["lr"]), l1, Path(row["path"])))
    return found


def judged(saes: dict[str, list[tuple[float, float, Path]]]) -> list[dict[str, Any]]:
    """Every SAE on held-out text, by one evaluator."""
    import torch

    from saeray.files.checkpoint import load_sae
    from saeray.lm.evaluate import Evaluator
    from saeray.lm.hub import load_tokenizer
    from saeray.lm.model import LanguageModel
    from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
    from saeray.text.tokens import TokenWindows

    config = resolve(
        LanguageModelSAERunnerConfig(
            model_name=str(MODEL),
            hook_point=HOOK,
            dataset_path=str(MODEL / "text" / "held_out.parquet"),
            context_size=SETTINGS["context_size"],
            eval_windows=64,
            device="cpu",
        )
    )
    windows = TokenWindows(config, load_tokenizer(config)).evaluation()
    evaluator = Evaluator(LanguageModel(config, [HOOK]), torch.from_numpy(windows.copy()))
    rows = []
    for system, members in saes.items():
        for lr, l1, folder in members:
            found = evaluator.evaluate(load_sae(str(folder)), HOOK)
            fvu = 1 - found["metrics/explained_variance"]
            score, never = found["metrics/CE_loss_score"], found["eval/features_never_fired"]
            values = (system, lr, l1, found["metrics/l0"], fvu, score, never)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def envelope(rows: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(L0, FVU) of the SAEs that no other beats in both, by L0."""
    best: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda r: (r["l0"], r["fvu"])):
        if not best or row["fvu"] < best[-1][1]:
            best.append((row["l0"], row["fvu"]))
    return best


def at(l0: float, line: Sequence[tuple[float, float]]) -> float | None:
    """FVU of an envelope at this L0, linear between its points in logarithms; None outside."""
    for (a, fa), (b, fb) in itertools.pairwise(line):
        if a <= l0 <= b:
            share = math.log(l0 / a) / math.log(b / a)
            return math.exp(math.log(fa) + share * math.log(fb / fa))
    return None


def report(rows: list[dict[str, Any]], output: Path) -> str:
    """The tables, in Markdown."""
    by_system: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_system.setdefault(row["system"], []).append(row)
    lines = ["| system | lr | λ (of the summed error) | L0 | FVU | CE score | never fired |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['system']} | {row['lr']:g} | {row['l1']:g} | {row['l0']:.1f} | "
            f"{row['fvu']:.4f} | {row['ce_loss_score']:.4f} | {row['never_fired']} |"
        )
    if PEER in by_system:
        theirs = envelope(by_system[PEER])
        others = [s for s in by_system if s != PEER]
        lines += ["", f"FVU at equal L0, each at its best learning rates, over {PEER}'s:", ""]
        lines.append(f"| L0 | FVU of {PEER} | " + " | ".join(others) + " |")
        lines.append("|---|---|" + "---|" * len(others))
        for l0 in (5, 8, 12, 18, 27, 40, 60, 90):
            fvu = at(l0, theirs)
            if fvu is None:
                continue
            ratios = [at(l0, envelope(by_system[s])) for s in others]
            shown = " | ".join("–" if r is None else f"{r / fvu:.3f} x" for r in ratios)
            lines.append(f"| {l0} | {fvu:.4f} | {shown} |")
    draw(by_system, output / "frontier.png")
    return "\n".join(lines)


def draw(by_system: dict[str, list[dict[str, Any]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, label in (
        (panels[0], "fvu", "fraction of variance unexplained"),
        (panels[1], "ce_loss_score", "CE loss score"),
    ):
        for system, rows in by_system.items():
            xs, ys = [r["l0"] for r in rows], [r[key] for r in rows]
            panel.scatter(xs, ys, s=14, label=system)
        panel.set(xscale="log", xlabel="L0, held-out text", ylabel=label)
    panels[0].set_yscale("log")
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="SAEs are kept there")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--lr", type=float, nargs="+", default=LR)
    parser.add_argument("--l1", type=float, nargs="+", default=L1)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    systems = [PEER, *(f"recipe {recipe}" for recipe in arguments.recipes)]
    saes = {system: trained(system, arguments) for system in systems}
    text = report(judged(saes), arguments.output)
    (arguments.output / "quality.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
