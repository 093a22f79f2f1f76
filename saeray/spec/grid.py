"""Grids: a config with lists in it, multiplied out into one config per SAE, each with a name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig, digest, grid_axes, resolve


class SAE(NamedTuple):
    """One point of a grid."""

    name: str  # unique in its sweep, derived from the config, safe as a folder name
    config: LanguageModelSAERunnerConfig


def expand(config: LanguageModelSAERunnerConfig) -> list[SAE]:
    """The Cartesian product over every field that holds a list.

    Raises:
        ConfigError: a value of the product is bad, or two points of it are the same SAE.
    """
    config = resolve(config)
    axes = grid_axes(config)
    points = []
    for values in itertools.product(*(getattr(config, axis) for axis in axes)):
        point = config.replace(**dict(zip(axes, values, strict=True)))
        points.append(SAE(derived_name(point, axes), point))
    refuse_duplicates(points)
    return points


def derived_name(config: LanguageModelSAERunnerConfig, axes: Sequence[str] | None = None) -> str:
    """The folder name of an SAE: its values on the axes, `l1_coefficient=8e-05,lr=0.0004`.

    Without known axes (a bare `tune.run`, where a trial sees only its own config) the name is made
    of l1_coefficient, lr and a digest of the whole config, which keeps it unique and derived.
    """
    if axes is None:
        whole = digest(config.to_dict(), 6)
        return f"{derived_name(config, ('l1_coefficient', 'lr'))},{whole}"
    parts = [f"{axis}={in_a_name(getattr(config, axis))}" for axis in axes]
    return ",".join(parts) or "sae"


def in_a_name(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, float) and float(text) != value:
        text = repr(value)  # %g would give two different values one name
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text)


def refuse_duplicates(points: Sequence[SAE]) -> None:
    seen: set[str] = set()
    for point in points:
        if point.name in seen:
            raise ConfigError(
                f"duplicate trial {point.name}: a grid axis holds the same value twice; "
                "every SAE of a sweep must differ in some field."
            )
        seen.add(point.name)
