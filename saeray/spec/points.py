"""`grid:` of a config: points beyond the product of its lists, as a list of partial configs.

    grid: [{lr: 1e-3, l1_coefficient: 2}, {architecture: topk, k: [8, 16]}]

What an entry gives stands for what the config gives beside it, a list being an axis there too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from saeray.errors import ConfigError, bad_value
from saeray.spec.checks import allowed_types, of_type
from saeray.spec.guide import in_our_words
from saeray.spec.stream import in_lists

PATHS = ("model_name", "dataset_path", "init_from")  # may hold a path of this machine


def checked_entries(
    entries: Any, cls: type, of_the_sweep: Collection[str], names_of_dtypes: Callable[[Any], Any]
) -> list[dict[str, Any]]:
    """The entries with every value of its field's type, by the fields' own names.

    of_the_sweep: fields that no entry can have.

    Raises:
        ConfigError: no list, an unknown or repeated key, a bad type; with the entry's number.
    """
    if not isinstance(entries, list) or not entries:
        raise bad_value(
            "grid", entries, "a list of partial configs, like [{lr: 1e-3}, {lr: 2e-3}]."
        )
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    checked: list[dict[str, Any]] = []
    for number, entry in enumerate(entries, start=1):
        try:
            if not isinstance(entry, Mapping):
                raise ConfigError(f"{entry!r}: `field: value` pairs are wanted.")
            values = in_our_words({str(k): v for k, v in entry.items()}, known)
            for name, value in values.items():
                if name in of_the_sweep:
                    raise bad_value(name, value, "concerns the whole sweep; give it beside grid.")
                allowed = allowed_types(hints[name])
                value = names_of_dtypes(value) if name.endswith("dtype") else value
                value = in_lists(name, value)
                if not isinstance(value, list):
                    values[name] = of_type(name, value, allowed)
                elif value:
                    values[name] = [of_type(name, v, allowed) for v in value]
                else:
                    raise bad_value(name, [], "an empty list makes an empty grid; give values.")
        except ConfigError as error:
            raise ConfigError(f"{of_entry(number)}{error}") from None
        checked.append(values)
    return checked


def of_entry(number: int) -> str:
    """How an error names an entry; the first is 1."""
    return f"grid, entry {number}: "


def all_values(config: Any, name: str) -> list[Any]:
    """Every value a field has in some SAE of the sweep, in their order."""
    found = []
    for entry in config.grid or [{}]:
        value = entry.get(name, getattr(config, name))
        found += value if isinstance(value, list) else [value]
    return found


def products(config: Any, entry: Mapping[str, Any], order: Sequence[str]) -> Iterator[dict]:
    """What each point of an entry is called by: the values along the config's axes and its own.

    order: the names of the fields.
    """
    along = {}
    for name in order:
        value = entry.get(name, getattr(config, name)) if name != "grid" else None
        if name in entry or isinstance(value, list):
            along[name] = value if isinstance(value, list) else [value]
    for values in itertools.product(*along.values()):
        yield dict(zip(along, values, strict=True))


def with_paths(values: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """The fields of a config that may hold paths, and its grid's, as changed."""
    changed: dict[str, Any] = {k: change(values[k]) for k in PATHS if k in values}
    grid = values.get("grid")
    if isinstance(grid, list):
        changed["grid"] = [
            {k: change(v) if k in PATHS else v for k, v in entry.items()}
            if isinstance(entry, Mapping)
            else entry
            for entry in grid
        ]
    return changed
