"""Grids: a config with lists in it, multiplied out into one config per SAE, each with a name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from saeray.errors import ConfigError
from saeray.spec import architectures
from saeray.spec.architectures import OWN_FIELDS, SPARSITY
from saeray.spec.config import LanguageModelSAERunnerConfig, digest, resolve
from saeray.spec.points import all_values, of_entry, products

NAME_LENGTH = 120  # characters of an SAE's name: file systems have 255, and paths have several
LABEL_LENGTH = 20  # what is left of a long label


class SAE(NamedTuple):
    """One point of a grid."""

    name: str  # unique in its sweep, derived from the config, safe as a folder name
    config: LanguageModelSAERunnerConfig


def expand(config: LanguageModelSAERunnerConfig) -> list[SAE]:
    """The Cartesian product over every field that holds a list, for each entry of `grid`.

    `eval_every` is filled where it is not given: the more SAEs, the less often. (With a scheduler
    that stops SAEs it stays as it is for one: it decides by evaluations.)

    Raises:
        ConfigError: a value of the product is bad, or two points of it are the same SAE.
    """
    config = resolve(config)
    order = [f.name for f in fields(config)]
    named: list[dict[str, Any]] = []  # by the fields that a point has its name of
    points: list[LanguageModelSAERunnerConfig] = []
    architectures_of = set(all_values(config, "architecture"))
    for number, entry in enumerate(config.grid or [{}], start=1):
        # Two values of its own architecture make this field foreign to some points, one does not.
        own = () if isinstance(entry.get("architecture"), list) else tuple(entry)
        of_this: list[dict[str, Any]] = []
        for values in products(config, entry, order):
            this = values.get("architecture", config.architecture)
            foreign = foreign_fields(this, architectures_of - {this})
            foreign = [name for name in foreign if name not in own]
            name_of = {name: v for name, v in values.items() if name not in foreign}
            if foreign and name_of in of_this:
                continue  # along an axis that means nothing for them they are all the same
            of_this.append(name_of)
            try:
                points.append(config.replace(**values | dict.fromkeys(foreign), grid=None))
            except ConfigError as error:
                where = of_entry(number) if config.grid else ""
                raise ConfigError(f"{where}{error}") from None
        named += of_this
    labels = {
        name: dict(zip(map(repr, along), labels_of(along), strict=True))
        for name in order
        if (along := [values[name] for values in named if name in values])
    }
    if len(points) > 1 and config.scheduler is None:
        points = [p.replace(eval_every=p.eval_every_among(len(points))) for p in points]
    saes = [
        SAE(joined(list(values), [labels[name][repr(v)] for name, v in values.items()]), point)
        for values, point in zip(named, points, strict=True)
    ]
    refuse_duplicates(saes)
    if config.grid is not None:
        refuse_equals(saes)
    return saes


def foreign_fields(this: str, others: Iterable[str]) -> list[str]:
    """Of a grid over architectures, the fields that belong to others of it than this point's."""
    known = {a for a in others if a in OWN_FIELDS}
    return [
        name
        for name in architectures.FIELDS
        if this in OWN_FIELDS
        and name not in OWN_FIELDS[this]
        and known.intersection(architectures.owners(name))
    ]


def derived_name(config: LanguageModelSAERunnerConfig) -> str:
    """The folder name of an SAE of which no axes are known (a bare `tune.run`).

    There a trial sees only its own config: what its sparsity comes from, lr and a digest of the
    whole config, which keeps it unique and derived.
    """
    known = [n for n in (*SPARSITY, "lr") if getattr(config, n) is not None]
    if config.architecture != "standard":
        known.insert(0, "architecture")
    name = joined(known, [label(getattr(config, field)) for field in known])
    return f"{name},{digest(config.to_dict(), 6)}"


def joined(axes: Sequence[str], labels: Sequence[str]) -> str:
    """`l1_coefficient=8e-05,lr=0.0004`, at most NAME_LENGTH characters long.

    Labels that are too long for that are cut, the longest first, each with a digest in its end.
    """
    labels = list(labels)

    def name() -> str:
        return ",".join(f"{a}={text}" for a, text in zip(axes, labels, strict=True)) or "sae"

    while len(name()) > NAME_LENGTH:
        at = max(range(len(labels)), key=lambda i: len(labels[i]))
        if len(labels[at]) <= LABEL_LENGTH:  # so many axes that their names alone are too long
            return f"{name()[: NAME_LENGTH - 7]}-{digest(name(), 6)}"
        labels[at] = f"{labels[at][: LABEL_LENGTH - 7]}-{digest(labels[at], 6)}"
    return name()


def labels_of(values: Sequence[Any]) -> list[str]:
    """The values of an axis in names: short, and different where the values are.

    Of a path its last part; where two would then be called the same, or where hardly a character
    can stand in a folder's name, with a digest of the whole value.
    """
    short = [label(value) for value in values]
    shared = Counter(text.casefold() for text, _ in {(label(v), repr(v)) for v in values})
    return [
        text if shared[text.casefold()] == 1 and readable(text) else f"{text}-{digest(value, 6)}"
        for text, value in zip(short, values, strict=True)
    ]


def label(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, tuple):
        text = "_".join(map(str, value))
    if isinstance(value, float) and float(text) != value:
        text = repr(value)  # %g would give two different values one name
    if isinstance(value, str):
        text = value.partition("?")[0].rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9._+-]", "_", text)


def readable(text: str) -> bool:
    return any(c.isalnum() for c in text.partition(".")[0])


def refuse_duplicates(points: Sequence[SAE]) -> None:
    seen: set[str] = set()
    for point in points:
        if point.name in seen:
            raise ConfigError(
                f"duplicate trial {point.name}: a grid axis holds the same value twice; "
                "every SAE of a sweep must differ in some field."
            )
        seen.add(point.name)


def refuse_equals(points: Sequence[SAE]) -> None:
    """Entries of `grid` can say the same in two ways."""
    names: dict[str, str] = {}
    for point in points:
        other = names.setdefault(digest(point.config.to_dict()), point.name)
        if other != point.name:
            raise ConfigError(
                f"grid: {other} and {point.name} are the same SAE; "
                "every SAE of a sweep must differ in some field."
            )
