"""pareto.png: a sweep's SAEs by L0 and fidelity, joined where only their sparsity differs."""

from __future__ import annotations

import io
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from saeray.files.frontier import hook_of, pareto
from saeray.files.storage import Folder
from saeray.spec.architectures import SPARSITY
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import label
from saeray.spec.messages import DONE, STOPPED

Row = Mapping[str, Any]

MOST_LABELS = 40  # points that are labelled: more hide each other
MANY_LINES = 6  # more have their legend beside the panels
MOST_LINES = 24  # in a legend
# What a line is called after, if it tells lines apart; then whatever else does.
FIRST = (
    "model_name", "hook_point", "architecture", "recipe", "expansion_factor", "lr", "seed",
)  # fmt: skip


def write_pareto(folder: Folder, rows: Sequence[Row], title: str) -> None:
    """pareto.png: L0 against CE_loss_score and against explained variance.

    A line joins SAEs that differ in nothing but what their sparsity comes from. The frontier, those
    of a hook point that no other one beats in both, has rings and a dotted line.
    Where the features are known, MCC is in the place of CE_loss_score, which there is none of.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    lines = joined(rows)
    beside = len(lines) > MANY_LINES
    figure = Figure(figsize=(15 if beside else 11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    colours = colormaps["tab20" if len(lines) > 10 else "tab10"]
    first = ("ce_loss_score", "CE loss score (1 = as the model, 0 = as zero-ablated)")
    if any(has(r, "mcc") for r in rows) and not any(has(r, "ce_loss_score") for r in rows):
        first = ("mcc", "MCC (mean |cos| to the matched known features)")
    for panel, key, about in (
        (panels[0], *first),
        (panels[1], "explained_variance", "explained variance, 1 − Σ‖x − x̂‖² / Σ‖x − mean‖²"),
    ):
        drawn = [r for r in rows if has(r, "l0") and has(r, key)]
        given = [key for key in SPARSITY if any(has(r, key) for r in drawn)]
        labels = drawn if len(drawn) <= MOST_LABELS else []
        for n, (name, members) in enumerate(lines.items()):
            line = sorted((r for r in members if has(r, "l0") and has(r, key)), key=l0_of)
            if line:
                panel.plot(
                    [r["l0"] for r in line],
                    [r[key] for r in line],
                    marker="o",
                    markersize=4,
                    color=colours(n % colours.N),
                    label=name if n < MOST_LINES else None,
                )
        for r in labels:
            panel.annotate(
                " ".join(f"{r[key]:g}" for key in SPARSITY if has(r, key)),
                (r["l0"], r[key]),
                textcoords="offset points",
                xytext=(4, -10),
                fontsize=7,
            )
        panel.set_xlabel("L0 (mean active features per token)")
        panel.set_ylabel(about)
        panel.grid(alpha=0.3)
        for n, on in enumerate(frontiers(drawn, key)):
            panel.plot(
                [r["l0"] for r in on],
                [r[key] for r in on],
                marker="o",
                markersize=9,
                markerfacecolor="none",
                linestyle=":",
                color="black",
                linewidth=1,
                label=None if n else "frontier",
            )
        if drawn:
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
            panel.xaxis.set_major_formatter(ScalarFormatter())  # 50 and 200, not powers of ten
            panel.xaxis.set_minor_formatter(NullFormatter())
            title_of = f"labels: {', '.join(given)}" if labels else None
            if not beside:
                panel.legend(title=title_of, title_fontsize=7, fontsize=8)
            elif panel is panels[1]:
                more = f"the first {MOST_LINES} of {len(lines)} lines"
                figure.legend(
                    handles=panel.get_legend_handles_labels()[0],
                    loc="outside right upper",
                    title=more if len(lines) > MOST_LINES else title_of,
                    title_fontsize=7,
                    fontsize=7,
                )
    figure.suptitle(title)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    folder.write("pareto.png", png.getvalue())


def has(row: Row, key: str) -> bool:
    """Whether there is a figure to draw."""
    return row.get(key) is not None and math.isfinite(row[key])


def l0_of(row: Row) -> float:
    return float(row["l0"])


def frontiers(rows: Sequence[Row], key: str) -> list[list[Row]]:
    """Of each hook point the ended SAEs that no other one beats in L0 and `key`, by L0."""
    at_hooks: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row.get("status", DONE) in (DONE, STOPPED):
            at_hooks.setdefault(hook_of(row), []).append(row)
    return [
        sorted((r for r, on in zip(of, pareto(points), strict=True) if on), key=l0_of)
        for of in at_hooks.values()
        for points in [[(l0_of(r), -r[key]) for r in of]]
    ]


def joined(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each line, by what it is called: the values in which lines differ.

    Fields that tell no more lines apart, since they follow from others, are left out of the name.
    """
    axes = [f.name for f in fields(LanguageModelSAERunnerConfig) if f.name not in SPARSITY]
    axes = [a for a in axes if any(a in row for row in rows)]
    axes.sort(key=lambda a: FIRST.index(a) if a in FIRST else len(FIRST))
    lines: dict[tuple[Hashable, ...], list[Row]] = {}
    for row in rows:
        lines.setdefault(tuple(repr(row.get(a)) for a in axes), []).append(row)
    telling: list[int] = []
    for i in range(len(axes)):
        if told(lines, [*telling, i]) > told(lines, telling):
            telling.append(i)
    if not telling and "lr" in axes:
        telling = [axes.index("lr")]

    def name(members: Sequence[Row]) -> str:
        values = [(axes[i], members[0].get(axes[i])) for i in telling]
        words = [label(v) if isinstance(v, str) else f"{a} {label(v)}" for a, v in values]
        return " ".join(words) or "all"

    return {name(members): members for members in lines.values()}


def told(lines: Mapping[tuple[Hashable, ...], Any], axes: Sequence[int]) -> int:
    """How many lines these axes tell apart."""
    return len({tuple(key[i] for i in axes) for key in lines})
