"""JSON as every program reads it: Python's own writes NaN and Infinity, which are not JSON.

A number that is not finite is written as null, and its name stands in a field `not_finite` of the
same object, at the same place:

    {"loss": null, "edges": [0.0, null], "not_finite": {"loss": "nan", "edges": {"1": "inf"}}}

`loads` puts them back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

WORDS = "not_finite"


def dumps(data: object, **options: Any) -> str:
    """data as JSON; options as of `json.dumps`.

    Raises:
        ValueError: a number that is not finite stands in no object, so its name has no place.
    """
    plain, words = split(data)
    if words is not None:
        raise ValueError(f"{words}: numbers that are not finite, and no object around them")
    return json.dumps(plain, allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
    """The inverse of `dumps`; other JSON as it is.

    Raises:
        ValueError: not JSON.
    """
    return json.loads(text, object_hook=joined)


def split(value: Any) -> tuple[Any, Any]:
    """The value with nulls where it is not finite, and their names by place (None: none)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, str(value)
    if isinstance(value, Mapping):
        parts = {key: split(inner) for key, inner in value.items()}
        plain = {key: inner for key, (inner, _) in parts.items()}
        words = {str(key): w for key, (_, w) in parts.items() if w is not None}
        return plain | ({WORDS: words} if words else {}), None
    if isinstance(value, (list, tuple)):
        items = [split(inner) for inner in value]
        words = {str(i): w for i, (_, w) in enumerate(items) if w is not None}
        return [inner for inner, _ in items], words or None
    return value, None


def joined(data: dict[str, Any]) -> dict[str, Any]:
    """An object with its numbers back."""
    for key, words in data.pop(WORDS, {}).items():
        data[key] = with_words(data.get(key), words)
    return data


def with_words(value: Any, words: Any) -> Any:
    if isinstance(words, str):
        return float(words)
    for i, inner in words.items():
        value[int(i)] = with_words(value[int(i)], inner)
    return value
