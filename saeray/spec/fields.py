"""Every field of the config, as its declaration has it: the one place that says what it means.

A field's words are the comment beside it, or the lines above it; a comment that begins a block, or
stands above a field that has words of its own, is the name of what follows. `saeray fields` prints
them, and docs/config.md is made of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, NamedTuple

from saeray.errors import ConfigError, nearest
from saeray.spec.architectures import owners
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.resources import Resources
from saeray.spec.scheduler import Scheduler

DECLARATION = re.compile(r"    (\w+): ([^=#]+?)(?: = ([^#]+?))?(?:  # (.*))?")
OURS = "saeray: "  # begins the words of what the guide does not have


class Field(NamedTuple):
    """One field."""

    name: str
    group: str
    type: str
    default: str | None  # None: it must be given
    words: str
    architectures: tuple[str, ...]  # that have it, where not all do


def all_fields() -> list[Field]:
    """In the order of their declaration; those of `scheduler:` and `resources:` last."""
    return [
        *declared(LanguageModelSAERunnerConfig),
        *declared(Scheduler, "scheduler."),
        *declared(Resources, "resources."),
    ]


def declared(kind: Any, prefix: str = "") -> list[Field]:
    """Of one dataclass, by its source."""
    found: list[Field] = []
    known = {f.name for f in fields(kind)}
    group, above, begins = prefix.rstrip("."), list[str](), True
    for line in inspect.getsource(kind).split('"""', 2)[2].splitlines():
        if not line.strip():
            above, begins = [], True
            continue
        if line.startswith("    # "):
            above.append(line[6:])
            continue
        match = DECLARATION.fullmatch(line)
        if match is None or match[1] not in known:
            above = []
            continue
        name, of_type, default, beside = match.groups()
        if above and (begins or beside) and not prefix:
            group = above.pop(0).removeprefix(OURS).rstrip(".")
            if beside and above:  # the rest of a name of several lines
                group, above = " ".join([group, *above]), []
        words = beside or " ".join(above)
        found.append(
            Field(
                prefix + name, group[:1].upper() + group[1:],
                of_type.replace("tuple", "list"), shown(default),
                words.removeprefix(OURS), tuple(owners(name)),
            )
        )  # fmt: skip
        above, begins = [], False
    return found


def shown(default: str | None) -> str | None:
    if default is not None and default.startswith("field("):
        return "{}"
    return None if default is None else default.replace("AUTO", '"auto"')


def matching(word: str) -> list[Field]:
    """The fields with a word in their name, their words or their group.

    Raises:
        ConfigError: there are none; names the nearest ones.
    """
    every = all_fields()
    low = word.lower()
    by_name = [f for f in every if low in f.name.lower()]
    found = by_name or [f for f in every if low in f"{f.words} {f.group}".lower()]
    if not found:
        raise ConfigError(
            f"fields {word!r}: no such field; {nearest(word, [f.name for f in every])}"
        )
    return found


def described(some: Iterable[Field]) -> str:
    """For a terminal."""
    lines, group = [], None
    for f in some:
        if f.group != group:
            group = f.group
            lines.append(f"\n{group}")
        default = "must be given" if f.default is None else f"default {f.default}"
        lines.append(f"  {f.name}: {f.type}, {default}")
        if f.words:
            lines.append(f"      {f.words}")
        if f.architectures:
            lines.append(f"      of architecture {', '.join(f.architectures)}")
    return "\n".join(lines).lstrip("\n")


def as_markdown() -> str:
    """docs/config.md."""
    lines = [
        "# Fields of a sweep",
        "",
        "Made by `saeray fields --markdown > docs/config.md` from the declarations in",
        "`saeray/spec/config.py`, `scheduler.py` and `resources.py`. A list in a field is a grid",
        "axis; [search.md](search.md) has `grid` and `scheduler`. None stands for `null` in YAML.",
    ]
    group = None
    for f in all_fields():
        if f.group != group:
            group = f.group
            lines += ["", f"## {group}", "", "| field | type | default | |", "|---|---|---|---|"]
        default = "must be given" if f.default is None else f"`{f.default}`"
        of = f" (of {', '.join(f.architectures)})" if f.architectures else ""
        words = f"{f.words}{of}".replace("|", "\\|").strip()
        kind = f.type.replace("|", "\\|")
        lines.append(f"| `{f.name}` | {kind} | {default} | {words} |")
    return "\n".join(lines) + "\n"
