"""The column that text or token ids are in, told from names and from what is in the rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from saeray.errors import ConfigError, bad_value
from saeray.spec.config import LanguageModelSAERunnerConfig

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text",)
MASK_COLUMN = "attention_mask"
TEXT, TOKENS = "text", "token ids"  # what a value can be
FIRST_ROWS = 256  # that are looked at, as far as needed


class Columns(NamedTuple):
    """What is read of a row."""

    value: str
    is_tokenized: bool
    mask: str | None = None  # of the same length as the token ids; 0 stands at padding

    @property
    def names(self) -> list[str]:
        return [self.value] if self.mask is None else [self.value, self.mask]

    def of_row(self, row: dict[str, Any]) -> Any:
        return self.of_values(*(row.get(name) for name in self.names))

    def of_values(self, value: Any, mask: Any = None) -> Any:
        """What `documents` gets of a row: the value, or token ids with their mask."""
        return value if self.mask is None or mask is None else Masked(value, mask)


class Masked(NamedTuple):
    ids: Any
    mask: Any


def choose_columns(
    config: LanguageModelSAERunnerConfig, names: Sequence[str], first_rows: Iterable[dict[str, Any]]
) -> Columns:
    """The columns to read. first_rows: are read as far as it takes to see what is in them.

    Raises:
        ConfigError: no such column, something else than text or token ids in it, or
            `is_dataset_tokenized` contradicts what is there.
    """
    named, tokenized = config.text_column, config.is_dataset_tokenized
    if named is not None and named not in names:
        raise no_column(config, names)
    tokens = [c for c in TOKEN_COLUMNS if c in names] if named is None else [named]
    text = [c for c in TEXT_COLUMNS if c in names] if named is None else [named]
    have = f"{config.dataset_path} has the columns {', '.join(names)}"
    if tokenized is True and not tokens:
        raise bad_value("is_dataset_tokenized", True, f"{have}, but no tokens or input_ids.")
    if tokenized is False and not text:
        raise bad_value("is_dataset_tokenized", False, f"{have}, but no text.")
    if not tokens and not text:
        raise no_column(config, names)
    found = first_values(list(dict.fromkeys(tokens + text)), first_rows)
    kinds = {name: kind_of(value) for name, value in found.items()}
    # A column without a value in the first rows is taken for what its name says.
    choices = [(c, True) for c in tokens if kinds[c] == TOKENS]
    choices += [(c, False) for c in text if kinds[c] == TEXT]
    choices += [(c, True) for c in tokens if kinds[c] is None and c in TOKEN_COLUMNS]
    choices += [(c, False) for c in text if kinds[c] is None]
    choices += [(c, True) for c in tokens if kinds[c] is None]
    for name, is_tokenized in choices:
        if tokenized in (None, is_tokenized):
            masks = is_tokenized and name != MASK_COLUMN and config.text_version > 1
            return Columns(
                name, is_tokenized, MASK_COLUMN if masks and MASK_COLUMN in names else None
            )
    considered = tokens + text if tokenized is None else tokens if tokenized else text
    holds = "; ".join(
        f"column {c!r} holds {described(found[c])}" for c in dict.fromkeys(considered)
    )
    wanted = {None: "text or a list of token ids", True: "a list of token ids", False: TEXT}
    field = "text_column" if named is not None else "is_dataset_tokenized"
    if named is None and tokenized is None:
        field = "dataset_path"
    raise bad_value(
        field,
        getattr(config, field),
        f"{holds}, but {wanted[tokenized]} is wanted; name another in text_column.",
    )


def no_column(config: LanguageModelSAERunnerConfig, names: Sequence[str]) -> ConfigError:
    if config.text_column is not None:
        have = f"{config.dataset_path} has the columns {', '.join(names)}"
        return bad_value("text_column", config.text_column, f"{have}.")
    return bad_value(
        "dataset_path",
        config.dataset_path,
        f"the columns are {', '.join(names)}; one called tokens, input_ids or text is wanted, "
        "or name yours in text_column.",
    )


def first_values(names: list[str], rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The first value of each column that is not empty; None where there is none."""
    found: dict[str, Any] = dict.fromkeys(names)
    for row in itertools.islice(rows, FIRST_ROWS):
        for name in names:
            if is_empty(found[name]):
                found[name] = row.get(name)
        if not any(is_empty(value) for value in found.values()):
            break
    return found


def is_empty(value: Any) -> bool:
    return value is None or (hasattr(value, "__len__") and len(value) == 0)


def kind_of(value: Any) -> str | None:
    """TEXT, TOKENS, None for what is empty, or what it is in words."""
    if is_empty(value):
        return None
    if isinstance(value, str):
        return TEXT
    return TOKENS if flat_ids(value) is not None else described(value)


def flat_ids(value: Any) -> np.ndarray | None:
    """Token ids [n] of a list of them, be it inside others (a batch of one); None: it is none."""
    if isinstance(value, (str, bytes, dict)):
        return None
    try:
        ids = np.asarray(value)
    except ValueError:  # lists of several lengths
        return None
    # Tokenised one at a time with return_tensors="pt", rows have a batch dimension of 1.
    while ids.ndim > 1 and ids.shape[0] == 1:
        ids = ids[0]
    return ids if ids.ndim == 1 and ids.dtype.kind in "iu" else None


def described(value: Any) -> str:
    """What a value is, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return TEXT
    if isinstance(value, dict):
        return f"a struct of {', '.join(map(str, value))}"
    if isinstance(value, (list, tuple, np.ndarray)):
        inner = described(value[0]).removeprefix("a ") if len(value) else "nothing"
        return f"a list of {len(value)} ({inner})"
    return {bool: "true or false", int: "a number", float: "a number", bytes: "bytes"}.get(
        type(value), f"a {type(value).__name__}"
    )
