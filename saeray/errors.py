"""The errors a user meets, each one paragraph: the field, its value, and what would be right.

They are plain `Exception`s with all text in `args`, so they survive pickling between Ray processes
(an exception with its own constructor arguments does not).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaerayError(Exception):
    """Base of every error saeray raises on purpose; the CLI prints it without a traceback."""


class ConfigError(SaerayError):
    """Bad input, found before anything is spent. The CLI exits with 2."""


class SAEFailed(SaerayError):
    """One SAE can't be trained on (its loss became NaN, say); the others of its pack go on."""


class Late(SaerayError):
    """A wait ran into its limit. Names who is late and the setting to change."""


def bad_value(field: str, value: object, remedy: str) -> ConfigError:
    """The usual shape of a `ConfigError`: `field = value: remedy`."""
    return ConfigError(f"{field} = {value!r}: {remedy}")


def printable(text: str) -> str:
    """Text as a terminal may have it: control characters from a dataset or a path spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def nearest(word: str, choices: Iterable[str], n: int = 3) -> str:
    """A `did you mean` clause for an unknown word, or the choices when nothing is near."""
    choices = list(choices)
    near = difflib.get_close_matches(word, choices, n=n, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return "known: " + ", ".join(sorted(choices)[:12]) + (", …" if len(choices) > 12 else "")
