"""The frontier: which SAEs no other one beats in both sparsity and fidelity, and a choice from it.

Everything that shows or chooses SAEs (a sweep's summary, `saeray best` and `compare`, data frames)
has it from here. Rows are those of results.csv, or of several of them. No I/O.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from saeray.errors import SaerayError, bad_value, nearest
from saeray.spec.messages import DONE, STOPPED
from saeray.spec.stream import ROW_FIELDS

Row = Mapping[str, Any]

# Figures of fidelity, held out: whether more of it is better.
MORE_IS_BETTER = {
    "fvu": False,
    "explained_variance": True,
    "explained_variance_per_token": True,
    "ce_loss_score": True,
    "ce_loss_with_sae": False,
    "kl_div": False,
}
MARKS = {"fvu": "FVU", "ce_loss_score": "CE"}  # the frontiers that tables show
BAND = 0.2  # how far from the L0 that is asked for an SAE may be: a share of it, as a ratio

# Figures at different models or hook points say nothing of each other.
HOOK_FIELDS = ("model_name", "model_revision", "hook_point", "hook_point_layer", "hook_point_out")

# What held-out text an SAE was judged on.
TEXT_FIELDS = (
    "dataset_path", "dataset_split", "dataset_config", "dataset_revision", "text_column",
    "txt_documents", "prepend_bos", "context_size", "eval_windows", *ROW_FIELDS,
)  # fmt: skip


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the frontier, where less is better in both coordinates.

    A point is on it unless another one is at most as large in both and smaller in one. Points that
    are equal in both are on it together.

    Args:
        points: pairs of finite numbers.
    """
    on = [False] * len(points)
    least, last = math.inf, None  # of the second coordinate, among those smaller in the first
    for i in sorted(range(len(points)), key=points.__getitem__):
        if points[i][1] < least or points[i] == last:
            on[i] = True
            least, last = points[i][1], points[i]
    return on


def figure(row: Row, name: str) -> float | None:
    """A figure of a row; None where it has none, or none that is finite.

    fvu, the fraction of variance unexplained, is 1 - explained_variance.
    """
    if name == "fvu" and row.get("fvu") is None:
        explained = figure(row, "explained_variance")
        return None if explained is None else 1 - explained
    value = row.get(name)
    return value if value is not None and math.isfinite(value) else None


def judged(row: Row, by: str) -> bool:
    """Whether a row can be on a frontier: an SAE that has ended by itself, with both figures."""
    ended = row["status"] in (DONE, STOPPED)
    return ended and None not in (figure(row, "l0"), figure(row, by))


def hook_of(row: Row) -> tuple[Any, ...]:
    """The model and the hook point, as far as rows differ in them."""
    return tuple(row.get(name) for name in HOOK_FIELDS)


def on_frontier(rows: Sequence[Row], by: str) -> list[bool]:
    """Of each row, whether no other one at its hook point has a lower L0 and is better in `by`.

    Raises:
        ConfigError: `by` is no figure of fidelity.
    """
    sign = -1 if more_is_better(by) else 1
    on = [False] * len(rows)
    at_hooks: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if judged(row, by):
            at_hooks.setdefault(hook_of(row), []).append(i)
    for members in at_hooks.values():
        points = [(number(rows[i], "l0"), sign * number(rows[i], by)) for i in members]
        for i, is_on in zip(members, pareto(points), strict=True):
            on[i] = is_on
    return on


def number(row: Row, name: str) -> float:
    """A figure that is there."""
    value = figure(row, name)
    assert value is not None
    return value


def more_is_better(by: str) -> bool:
    if by not in MORE_IS_BETTER:
        known = nearest(by, MORE_IS_BETTER)
        raise bad_value("by", by, f"no figure to choose SAEs by; {known}")
    return MORE_IS_BETTER[by]


def marks(rows: Sequence[Row]) -> list[str]:
    """Of each row, which frontiers it is on: `FVU CE`, `FVU`, `CE` or nothing."""
    flags = {mark: on_frontier(rows, by) for by, mark in MARKS.items()}
    return [" ".join(mark for mark, on in flags.items() if on[i]) for i in range(len(rows))]


def best(rows: Sequence[Row], l0: float, by: str = "fvu", within: float = BAND) -> int:
    """The place of the SAE on the frontier of L0 and `by` whose L0 is nearest to the one wanted.

    Nearest in ratio: 25 is as far from 50 as 100 is. Of two that are as near, the sparser one.

    Args:
        rows: of SAEs at one hook point.
        within: how far off its L0 may be: with 0.2, from l0 / 1.2 to l0 * 1.2.

    Raises:
        ConfigError: an L0 or a band that is no positive number, a `by` that is no figure.
        SaerayError: no SAE has finished, or none on the frontier is in the band; names those next
            to it.
    """
    for name, value in (("l0", l0), ("within", within)):
        if not (math.isfinite(value) and value > 0):
            raise bad_value(name, value, "a number above 0.")
    more_is_better(by)
    if not any(judged(row, by) for row in rows):
        raise SaerayError(nothing_judged(rows, by))
    hooks = {hook_of(row) for row in rows if judged(row, by)}
    if len(hooks) > 1:
        raise SaerayError(several_hooks(hooks))
    on = [row for row, is_on in zip(rows, on_frontier(rows, by), strict=True) if is_on]

    def distance(row: Row) -> tuple[float, float]:
        value = number(row, "l0")
        return (abs(math.log(value / l0)) if value > 0 else math.inf, value)

    chosen = min(on, key=distance)
    if distance(chosen)[0] > math.log1p(within) + 1e-12:
        raise SaerayError(none_in_band(rows, on, l0, by, within))
    return next(i for i, row in enumerate(rows) if row is chosen)


def nothing_judged(rows: Sequence[Row], by: str) -> str:
    if not any(row["status"] in (DONE, STOPPED) for row in rows):
        states = [row["status"] for row in rows]
        counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        return f"no SAE has finished ({counted or 'none was begun'}), so there is none to choose."
    return f"no finished SAE has both an L0 and {by}; choose by another figure."


def several_hooks(hooks: set[tuple[Any, ...]]) -> str:
    """Says in what the hook points differ, and how one of them is asked for."""
    differing = [
        f"{name}: " + ", ".join(sorted({str(h[i]) for h in hooks}))
        for i, name in enumerate(HOOK_FIELDS)
        if len({h[i] for h in hooks}) > 1
    ]
    return (
        f"these SAEs are at {len(hooks)} hook points, whose figures can't be compared: say which "
        f"({'; '.join(differing)}), as hook_point=… in Python, --where hook_point=… on the command "
        "line."
    )


def none_in_band(rows: Sequence[Row], on: Sequence[Row], l0: float, by: str, within: float) -> str:
    """Why there is nothing to choose, and what is next to it."""
    low, high = l0 / (1 + within), l0 * (1 + within)
    said = [
        f"no SAE on the frontier of L0 and {by} has an L0 within {within:.0%} of {l0:g} "
        f"({low:.3g} to {high:.3g})."
    ]
    below = max((r for r in on if number(r, "l0") < low), key=l0_of, default=None)
    above = min((r for r in on if number(r, "l0") > high), key=l0_of, default=None)
    next_to = [
        f"{r['trial']} with {l0_of(r):.4g}{takes(l0_of(r), l0)}"
        for r in (below, above)
        if r is not None
    ]
    said.append(f"Next to it: {', '.join(next_to)}.")
    beaten = [r for r in rows if judged(r, by) and low <= number(r, "l0") <= high]
    if beaten:
        names = ", ".join(f"{r['trial']} ({l0_of(r):.4g})" for r in beaten[:3])
        said.append(f"In the band, but beaten by sparser ones: {names}.")
    return " ".join(said)


def takes(value: float, l0: float) -> str:
    """The band that an SAE of this L0 would be in, rounded up."""
    if value <= 0:
        return ""
    return f" (within {math.ceil(100 * (max(value / l0, l0 / value) - 1) - 1e-9) / 100:g})"


def l0_of(row: Row) -> float:
    return number(row, "l0")


def cautions(rows: Sequence[Row]) -> list[str]:
    """What makes figures at one hook point not quite comparable."""
    differing = {
        name: values
        for name in TEXT_FIELDS
        if len(values := list(dict.fromkeys(str(row.get(name)) for row in rows))) > 1
    }
    if not differing:
        return []
    listed = "; ".join(f"{name}: {', '.join(values[:4])}" for name, values in differing.items())
    return [f"not all were judged on the same held-out text ({listed})."]
