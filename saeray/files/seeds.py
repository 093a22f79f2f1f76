"""SAEs that differ only in their seed: mean and interval of their figures, and their stability.

Stability is PW-MCC (`saeray.sae.stability`): how much of a dictionary comes again with another
seed. An SAE's own, the column `pw_mcc` of the results, is its mean over the other seeds.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from saeray.files.frontier import Row, figure
from saeray.files.results import add_column
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import DONE, ENDS

COLUMN = "pw_mcc"
WEIGHTS = "sae_weights.safetensors"
SEED_FIELDS = ("seed", "data_seed")
CONFIG_FIELDS = frozenset(f.name for f in fields(LanguageModelSAERunnerConfig))
FIGURES = {"l0": ".1f", "fvu": ".4f", "ce_loss_score": ".4f"}  # those that tables show

# Student's t at 97.5 %, for 1, 2, … degrees of freedom; for more, the series in 1 / degrees.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % interval (Student's t); None of a single value."""

    mean: float
    half: float | None


def interval(values: Sequence[float]) -> Interval:
    """Of at least one value, taken as drawn independently from one normal distribution."""
    n = len(values)
    mean = statistics.fmean(values)
    if n < 2:
        return Interval(mean, None)
    return Interval(mean, t_975(n - 1) * statistics.stdev(values) / math.sqrt(n))


def t_975(freedom: int) -> float:
    """Student's t at 97.5 %, to 3 digits after the point."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = 1.959964  # Abramowitz and Stegun 26.7.5
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


class SeedGroup(NamedTuple):
    """Finished SAEs of one sweep that differ in their seeds and in nothing else; two at least."""

    label: str  # what they have in common, of what varies in the sweep
    rows: list[Row]

    def over_seeds(self, name: str) -> Interval | None:
        """Mean and interval of a figure, if any of them has it."""
        values = [v for v in (figure(row, name) for row in self.rows) if v is not None]
        return interval(values) if values else None


def seed_groups(rows: Sequence[Row]) -> list[SeedGroup]:
    """The finished SAEs by what they have in common but their seeds.

    SAEs that a scheduler stopped early are left out: they have not seen the same tokens.
    """
    groups: dict[tuple[Any, str], list[Row]] = {}
    for row in rows:
        if row["status"] == DONE and any(name in row for name in SEED_FIELDS):
            alike = ",".join(
                f"{name}={shown(value)}"
                for name, value in row.items()
                if name in CONFIG_FIELDS and name not in SEED_FIELDS and value is not None
            )
            groups.setdefault((row.get("sweep"), alike), []).append(row)
    return [SeedGroup(alike, of) for (_, alike), of in groups.items() if len(of) > 1]


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Each group's label and its figures, mean ± interval, under a head; none without groups.

    PW-MCC has no interval: its pairs share SAEs, so they are not independent.
    """
    groups = seed_groups(rows)
    if not groups:
        return []
    lines = [
        ("over seeds, mean ± 95 % interval", in_columns("seeds", "L0", "FVU", "CE score", "PW-MCC"))
    ]
    for group in groups:
        found = [(group.over_seeds(name), form) for name, form in FIGURES.items()]
        figures = ["–" if i is None else plus_minus(i, form) for i, form in found]
        alike = group.over_seeds(COLUMN)
        stability = "–" if alike is None else f"{alike.mean:.3f}"
        lines.append((group.label, in_columns(str(len(group.rows)), *figures, stability)))
    return lines


def plus_minus(of: Interval, form: str) -> str:
    return f"{of.mean:{form}}" + ("" if of.half is None else f" ± {of.half:{form}}")


def in_columns(*cells: str) -> str:
    widths = (5, 13, 15, 15, 6)
    return " ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))


class Stability(NamedTuple):
    """PW-MCC by trial, and why groups have none."""

    pw_mcc: dict[str, float]
    left_out: list[str]


def stability(folder: Folder, rows: Sequence[Row], most_seconds: float | None = None) -> Stability:
    """Of every SAE of a sweep that has finished with another seed as well and has none yet.

    Args:
        folder: of the sweep, with the SAEs' weights.
        most_seconds: of a core, as estimated beforehand; groups that would go beyond that are left
            out.

    What can't be matched (too wide a decoder, one that is not finite or is gone) is left out, too.
    """
    from saeray.sae.stability import estimated_seconds, pw_mcc

    values: dict[str, float] = {}
    left_out: list[str] = []
    spent = 0.0
    for group in seed_groups(rows):
        if all(figure(row, COLUMN) is not None for row in group.rows):
            continue
        finals = {row["trial"]: folder / "trials" / row["trial"] / "final" for row in group.rows}
        pairs = list(itertools.combinations(finals, 2))
        try:
            cost = len(pairs) * estimated_seconds(max(map(width, finals.values())))
            if most_seconds is not None and spent + cost > most_seconds:
                left_out.append(
                    f"{group.label}: no PW-MCC, which takes about {cost:.0f} s; `saeray compare "
                    f"--stability {folder.uri}` computes it."
                )
                continue
            spent += cost
            decoders = {trial: decoder(final) for trial, final in finals.items()}
            found = {(a, b): pw_mcc(decoders[a], decoders[b]) for a, b in pairs}
        except (OSError, ValueError, RuntimeError, MemoryError) as error:  # no memory: torch's too
            left_out.append(f"{group.label}: no PW-MCC: {error}")
            continue
        for trial in finals:
            values[trial] = statistics.fmean(v for pair, v in found.items() if trial in pair)
    return Stability(values, left_out)


def add_stability(
    folder: Folder, rows: list[dict[str, Any]], most_seconds: float | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows with the column `pw_mcc`, and why SAEs of several seeds have none.

    It is written into the results too, once every SAE has ended: nobody else writes them then.
    Rows without SAEs that differ only in their seed come back as they are.
    """
    values, left_out = stability(folder, rows, most_seconds)
    if not values:
        return rows, left_out
    rows = [row | {COLUMN: values.get(row["trial"], row.get(COLUMN))} for row in rows]
    if all(row["status"] in ENDS for row in rows):
        try:
            add_column(folder, COLUMN, {row["trial"]: row[COLUMN] for row in rows})
        except OSError as error:  # one may read a sweep that one may not write
            left_out.append(f"PW-MCC is not in the results: {error}")
    return rows, left_out


def width(final: Folder) -> int:
    """L of a published SAE, from the head of its file.

    Raises:
        OSError: it is not there. ValueError: what is there is no safetensors file with a W_dec.
    """
    size = int.from_bytes(final.read(WEIGHTS, 0, 8), "little")
    try:
        return int(json.loads(final.read(WEIGHTS, 8, size))["W_dec"]["shape"][0])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{final.uri}/{WEIGHTS}: {error}") from None


def decoder(final: Folder) -> Any:
    """W_dec [L, D] of a published SAE, whatever its architecture.

    Raises:
        OSError: it is not there. ValueError: it was cut off.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(final.read(WEIGHTS))["W_dec"]
    except SafetensorError as error:
        raise ValueError(f"{final.uri}/{WEIGHTS}: {error}") from None
