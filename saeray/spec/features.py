"""What is asked of a sweep's features, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from saeray.errors import bad_value

TOKENS = 1 << 18  # read by default
TOP = 20  # contexts of a feature
BANDS, PER_BAND = 5, 5  # below the top
VERSION = 1  # of what is gathered and how it is written down


class Wanted(NamedTuple):
    """What is asked for, in plain data."""

    saes: Sequence[str]  # of the sweep
    tokens: int = TOKENS
    top: int = TOP
    harvesters: int | None = None  # None: as the sweep had them
    formats: Sequence[str] = ("pages",)

    def checked(self) -> Wanted:
        """Raises a `ConfigError` where a number makes no sense."""
        for name, value, least in (
            ("--tokens", self.tokens, 1), ("--top", self.top, 1),
            ("--harvesters", self.harvesters, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise bad_value(name, value, f"at least {least}.")
        if self.top > 1000:
            raise bad_value("--top", self.top, "at most 1,000 contexts of each feature.")
        return self
