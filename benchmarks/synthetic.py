"""How much of a known dictionary each architecture finds, at its best sparsity, setting by setting.

    python benchmarks/synthetic.py --output results/known
    python benchmarks/synthetic.py --output results/look --settings easy --tokens 500000

One sweep per architecture trains its grid (`ARCHITECTURES`) on every setting (`SETTINGS`); the SAE
with the largest MCC stands for the architecture there. Figures are those of the results, on rows
that none was trained on; docs/synthetic.md says what they are. Sweeps that are there already are
not trained again, so an architecture can be added to a table.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "easy": "synthetic:d_in=64,features=256,l0=4",
    "zipf": "synthetic:d_in=64,features=256,l0=4,zipf=0.7",
    "hierarchy": "synthetic:d_in=64,features=256,l0=4,hierarchy=3",
    "correlation": "synthetic:d_in=64,features=256,l0=4,correlation=0.4",
}
# What all of them have; a width of 4 * 64 is as many latents as there are features.
SHARED: dict[str, Any] = {
    "expansion_factor": 4,
    "train_batch_size": 1024,
    "context_size": 128,
    "store_batch_size": 32,
    "n_batches_in_buffer": 16,
    "eval_windows": 128,
    "eval_every": 0,
    "wandb_log_frequency": 100,
    "log_to_wandb": False,
    "device": "cpu",
}
# Fields of each architecture; lists are its grid. The loss is the summed error of recipe sae_lens.
TOPK = {"k": [4, 6, 8], "lr": 3e-3}
# In a thousand steps most features would be dead before a window of a thousand says so.
REVIVED = {"lr": 1e-2, "auxk_scaling": "dead_share", "dead_feature_window": 20}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {"recipe": "sae_lens", "l1_coefficient": [0.2, 0.3, 0.45], "lr": 3e-3},
    "p_anneal": {"l1_coefficient": [0.2, 0.3, 0.45], "lr": 3e-3},
    "gated": {"l1_coefficient": [1.0, 1.5, 2.0], "lr": 3e-3},
    "topk": TOPK,
    "batchtopk": TOPK | REVIVED,
    "matryoshka": TOPK | REVIVED | {"k": [4, 5, 6], "matryoshka_widths": "128"},
    "jumprelu": {"l0_coefficient": [0.05, 0.1, 0.2], "lr": 3e-3},
}
FIGURES = (
    ("L0", "l0", ".2f"),
    ("expl. var.", "explained_variance", ".4f"),
    ("MCC", "mcc", ".3f"),
    ("found", "features_found", ".3f"),
    ("precision", "firing_precision", ".3f"),
    ("recall", "firing_recall", ".3f"),
    ("F1", "firing_f1", ".3f"),
    ("shrinkage", "shrinkage", ".3f"),
    ("never fired", "features_never_fired_held_out", ".0f"),
)


def grid_fields(architecture: str) -> list[str]:
    return [k for k, v in ARCHITECTURES[architecture].items() if isinstance(v, list)]


def trained(architecture: str, arguments: argparse.Namespace) -> list[dict[str, str]]:
    """The rows of an architecture's results; trains what is not there."""
    folder: Path = arguments.output / architecture
    results = folder / "saes" / "results.csv"
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        sweep = SHARED | ARCHITECTURES[architecture]
        sweep |= {
            "architecture": architecture,
            "model_name": [SETTINGS[s] for s in arguments.settings],
            "training_tokens": arguments.tokens,
            "seed": arguments.seed,
            "storage_path": str(folder),
        }
        file = folder / "sweep.yaml"
        file.write_text(json.dumps(sweep))  # JSON is YAML
        print(f"{architecture} …", flush=True)
        command = [sys.executable, "-m", "saeray", "sweep", str(file), "--name", "saes"]
        with (folder / "log.txt").open("w") as log:
            env = os.environ | {"RAY_AUTH_MODE": "disabled"}
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=env)
        if done.returncode:
            raise RuntimeError(f"{architecture} failed: see {folder / 'log.txt'}")
        (folder / "complete").touch()
    return list(csv.DictReader(results.open()))


def of_setting(rows: list[dict[str, str]], setting: str) -> list[dict[str, str]]:
    """The rows of a setting; where there is one setting only, it is no column."""
    from saeray.spec.synthetic import parse

    name = str(parse(SETTINGS[setting]))
    return [r for r in rows if r.get("model_name", name) == name]


def report(by_architecture: dict[str, list[dict[str, str]]], settings: list[str]) -> str:
    titles = [title for title, _, _ in FIGURES]
    parts = []
    for setting in settings:
        lines = [
            f"**{setting}** (`{SETTINGS[setting]}`):",
            "",
            "| architecture | at | " + " | ".join(titles) + " |",
            "|---|---|" + "---|" * len(titles),
        ]
        for architecture, rows in by_architecture.items():
            here = of_setting(rows, setting)
            best = max(here, key=lambda r: float(r["mcc"] or 0))
            lines.append(line(architecture, best))
        parts.append("\n".join(lines))
    lines = ["All of them:", "", "| setting | architecture | at | " + " | ".join(titles) + " |"]
    lines.append("|---|---|---|" + "---|" * len(titles))
    for setting in settings:
        for architecture, rows in by_architecture.items():
            lines += [f"| {setting} {line(architecture, r)}" for r in of_setting(rows, setting)]
    return "\n\n".join([*parts, "\n".join(lines)])


def line(architecture: str, row: dict[str, str]) -> str:
    at = ", ".join(f"{name} {float(row[name]):g}" for name in grid_fields(architecture))
    figures = [format(float(row[key]), form) if row[key] else "–" for _, key, form in FIGURES]
    return f"| {architecture} | {at} | " + " | ".join(figures) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="SAEs are kept there")
    parser.add_argument(
        "--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES)
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--tokens", type=int, default=1_000_000, help="rows that an SAE trains on")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output = arguments.output.resolve()
    began = time.monotonic()
    rows = {a: trained(a, arguments) for a in arguments.architectures}
    text = report(rows, arguments.settings)
    (arguments.output / "synthetic.md").write_text(text + "\n")
    print(text)
    print(f"\n{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
