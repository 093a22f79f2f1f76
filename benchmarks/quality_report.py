"""What quality.py says of trained SAEs: one evaluator for all, frontiers, tables, pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers import SETTINGS

THEIRS = "sae_lens"  # what the names of its systems begin with
LEVELS = (5, 8, 12, 18, 27, 40, 60, 90)  # L0 at which frontiers are compared
Row = dict[str, Any]


def model_and_windows(model: Path, hook: str, n: int) -> tuple[Any, Any]:
    """The language model and n windows of its held-out text, [n, context_size]."""
    import torch

    from saeray.lm.hub import load_tokenizer
    from saeray.lm.model import LanguageModel
    from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
    from saeray.text.tokens import TokenWindows

    config = resolve(
        LanguageModelSAERunnerConfig(
            model_name=str(model),
            hook_point=hook,
            dataset_path=str(model / "text" / "held_out.parquet"),
            context_size=SETTINGS["context_size"],
            eval_windows=n,
            device="cpu",
        )
    )
    windows = TokenWindows(config, load_tokenizer(config)).evaluation()
    return LanguageModel(config, [hook]), torch.from_numpy(windows.copy())


def mean_centred_norm(model: Path, hook: str) -> float:
    """Mean of ‖x - mean x‖ over the activations of 64 held-out windows."""
    lm, windows = model_and_windows(model, hook, 64)
    x = lm.activations(windows)[hook].reshape(-1, lm.facts.d_in[hook]).float()
    return float((x - x.mean(dim=0)).norm(dim=1).mean())


def judged(saes: Sequence[Any], model: Path, hook: str) -> list[Row]:
    """Every SAE on the same held-out text, by one evaluator."""
    from saeray.files.checkpoint import load_sae
    from saeray.lm.evaluate import Evaluator

    evaluator = Evaluator(*model_and_windows(model, hook, 64))
    rows = []
    for sae in saes:
        found = evaluator.evaluate(load_sae(str(sae.folder)), hook)
        rows.append(
            {
                "system": sae.system,
                "seed": sae.seed,
                "lr": sae.lr,
                "l1": sae.l1,
                "l0": found["metrics/l0"],
                "fvu": 1 - found["metrics/explained_variance"],
                "ce": found["metrics/CE_loss_score"],
                "never": found["eval/features_never_fired"],
            }
        )
    return rows


def best_at(l0: float, rows: Sequence[Row]) -> float | None:
    """FVU at this L0 of whichever system, seed and learning rate has the least; None outside.

    Between the SAEs of one learning rate, linear in logarithms.
    """
    lines: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["system"], row["seed"], row["lr"]), []).append(row)
    found = [at(l0, line) for line in lines.values()]
    return min((fvu for fvu in found if fvu is not None), default=None)


def at(l0: float, line: Sequence[Row]) -> float | None:
    """FVU at this L0; None beyond the outermost."""
    if not min(r["l0"] for r in line) <= l0 <= max(r["l0"] for r in line):
        return None
    return at_equal_l0(l0, line)


def at_equal_l0(l0: float, line: Sequence[Row]) -> float:
    """FVU at this L0, linear in logarithms between its neighbours, or beyond the outermost two."""
    points = sorted((math.log(r["l0"]), math.log(r["fvu"])) for r in line)
    wanted = math.log(l0)
    i = min(max(sum(x <= wanted for x, _ in points), 1), len(points) - 1)
    (a, fa), (b, fb) = points[i - 1 : i + 1]
    return math.exp(fa + (wanted - a) / (b - a) * (fb - fa))


def report(rows: list[Row], output: Path) -> str:
    """The tables, in Markdown; frontier.png beside them."""
    by_system: dict[str, list[Row]] = {}
    for row in rows:
        by_system.setdefault(row["system"], []).append(row)
    draw(by_system, output / "frontier.png")
    parts = [frontiers(by_system)]
    if len({r["seed"] for r in rows}) > 1:
        parts.append(seeds(by_system))
    return "\n\n".join([*parts, all_saes(rows)])


def frontiers(by_system: dict[str, list[Row]]) -> str:
    """FVU of each system at equal L0, over the best that sae_lens reaches there."""
    theirs = [r for s, rows in by_system.items() if s.startswith(THEIRS) for r in rows]
    lines = ["| L0 | FVU of sae_lens's best | " + " | ".join(by_system) + " |"]
    lines.append("|---|---|" + "---|" * len(by_system))
    for l0 in LEVELS:
        fvu = best_at(l0, theirs)
        if fvu is None:
            continue
        ratios = [best_at(l0, rows) for rows in by_system.values()]
        shown = " | ".join("–" if r is None else f"{r / fvu:.3f} x" for r in ratios)
        lines.append(f"| {l0} | {fvu:.4f} | {shown} |")
    return "\n".join(lines)


def seeds(by_system: dict[str, list[Row]]) -> str:
    """Mean and standard deviation over seeds of each SAE, and the systems' ratio to the first."""
    lines = ["| lr | λ | system | L0 | FVU | CE score | FVU over the first's |"]
    lines.append("|---|---|---|---|---|---|---|")
    first = next(iter(by_system.values()))
    for lr, l1 in dict.fromkeys((r["lr"], r["l1"]) for r in first):
        base = None
        for system, rows in by_system.items():
            here = [r for r in rows if (r["lr"], r["l1"]) == (lr, l1)]
            base = base or statistics.mean(r["fvu"] for r in here)
            figures = [spread([r[key] for r in here], digits) for key, digits in FIGURES]
            ratio = statistics.mean(r["fvu"] for r in here) / base
            lines.append(
                f"| {lr:g} | {l1:g} | {system} | " + " | ".join(figures) + f" | {ratio:.3f} |"
            )
    return "\n".join(lines)


FIGURES = (("l0", 1), ("fvu", 4), ("ce", 4))


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def all_saes(rows: list[Row]) -> str:
    lines = ["| system | seed | lr | λ (of the summed error) | L0 | FVU | CE score | never fired |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row['system']} | {row['seed']} | {row['lr']:g} | {row['l1']:g} | "
            f"{row['l0']:.1f} | {row['fvu']:.4f} | {row['ce']:.4f} | {row['never']} |"
        )
    return "\n".join(lines)


def draw(by_system: dict[str, list[Row]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, key, label in (
        (panels[0], "fvu", "fraction of variance unexplained"),
        (panels[1], "ce", "CE loss score"),
    ):
        for system, rows in by_system.items():
            panel.scatter([r["l0"] for r in rows], [r[key] for r in rows], s=14, label=system)
        panel.set(xscale="log", xlabel="L0, held-out text", ylabel=label)
    panels[0].set_yscale("log")
    panels[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    raise SystemExit("run quality.py")
