"""The frontier as text: L0 against fidelity, at a sweep's end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saeray.files import frontier

WIDTH, HEIGHT = 60, 12  # of the field of points
ON, OFF = "●", "·"
FIGURES = {"ce_loss_score": "CE score", "explained_variance": "expl. variance", "mcc": "MCC"}


def plotted(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a picture of the finished SAEs; none for fewer than three.

    L0 on a logarithmic axis, and CE loss score where there is one; ● is on the frontier, of its
    hook point where there are several.
    """
    for by, name in FIGURES.items():
        points = [r for r in rows if frontier.judged(r, by) and frontier.number(r, "l0") > 0]
        if len(points) >= 3:
            return drawn(points, by, name)
    return []


def drawn(rows: Sequence[Mapping[str, Any]], by: str, name: str) -> list[str]:
    xs = [math.log(frontier.number(r, "l0")) for r in rows]
    ys = [frontier.number(r, by) for r in rows]
    field = [[" "] * WIDTH for _ in range(HEIGHT)]
    marked = (
        frontier.on_frontier(rows, by) if by in frontier.MORE_IS_BETTER else [False] * len(rows)
    )
    for x, y, on in sorted(zip(xs, ys, marked, strict=True), key=lambda point: point[2]):
        column, row = place(x, min(xs), max(xs), WIDTH), place(y, min(ys), max(ys), HEIGHT)
        field[HEIGHT - 1 - row][column] = ON if on or by not in frontier.MORE_IS_BETTER else OFF
    labels = {0: f"{max(ys):.3f}", HEIGHT - 1: f"{min(ys):.3f}"}
    lines = [f"{name} by L0 ({ON}: on the frontier)"]
    lines += [f"{labels.get(i, ''):>7} │{''.join(line).rstrip()}" for i, line in enumerate(field)]
    low, high = (f"{math.exp(x):.3g}" for x in (min(xs), max(xs)))
    middle = f"{math.exp((min(xs) + max(xs)) / 2):.3g}"
    lines.append(f"{'':>7} └{'─' * WIDTH}")
    lines.append(f"{'L0':>7}  {low:<{WIDTH // 3}}{middle:^{WIDTH // 3}}{high:>{WIDTH // 3}}")
    return lines


def place(value: float, low: float, high: float, size: int) -> int:
    return round((value - low) / (high - low) * (size - 1)) if high > low else size // 2
