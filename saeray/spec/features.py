"""What is asked of a sweep's features, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from saeray.errors import bad_value

TOKENS = 1 << 18  # read by default
TOP = 20  # contexts of a feature
BANDS, PER_BAND = 5, 5  # below the top
# SAEs that get pages at a sweep's end: of more on its frontier, so many, spread over their L0.
MOST_AT_END = 12
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


def tokens_at_end(features: bool | int) -> int | None:
    """Tokens to read for a config's `features`; None: no pages are asked for."""
    if features is True:
        return TOKENS
    return features or None


def check_features(features: bool | int, has_text: bool) -> None:
    """Raises a `ConfigError` where `features` of a config makes no sense."""
    if features is not True and features < 0:
        raise bad_value("features", features, "true, false, or a number of tokens to read.")
    if features and not has_text:
        raise bad_value(
            "features",
            features,
            "a synthetic model has no text, so features have no contexts; how they match the known "
            "ones is in the results (docs/synthetic.md).",
        )
