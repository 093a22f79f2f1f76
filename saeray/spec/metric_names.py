"""Names of figures, by what they are of: `metrics/…` of a training batch, `eval/…` held out.

Plain data; docs/metrics.md says what each figure is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BATCH, HELD_OUT = "metrics/", "eval/"
EVALUATED = "eval/n_tokens"  # only lines with held-out figures have it


def held_out(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of an evaluation, by the names that they have in logs."""
    return {
        HELD_OUT + key.removeprefix(BATCH) if key.startswith(BATCH) else key: value
        for key, value in figures.items()
    }


def of_batch(name: str) -> str:
    """What a held-out figure is called where it is a batch's."""
    return BATCH + name.removeprefix(HELD_OUT) if name.startswith(HELD_OUT) else name


def by_prefix(line: dict[str, Any]) -> dict[str, Any]:
    """A log line of any version, by the names of now.

    Up to November 2026 held-out figures stood in the place of the batch's, under their names.
    """
    older = EVALUATED in line and "eval/l0" not in line and "metrics/l0" in line
    return held_out(line) if older else line


def with_aliases(figures: Mapping[str, Any]) -> dict[str, Any]:
    """With `metrics/…` for held-out figures that no batch has, as they were called before."""
    former = {
        of_batch(key): value
        for key, value in figures.items()
        if key.startswith(HELD_OUT) and key != EVALUATED
    }
    return former | dict(figures)
