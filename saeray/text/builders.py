"""`datasets`' own builders, made to read only the columns that are wanted, and to name the file
that can't be read.

Files of one dataset need not have the same columns: what nobody asked for is not even compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from datasets.packaged_modules.arrow.arrow import Arrow, ArrowConfig
from datasets.packaged_modules.json.json import Json, JsonConfig
from datasets.packaged_modules.parquet.parquet import Parquet
from datasets.packaged_modules.text.text import Text

from saeray.text.rows import Unreadable


class Noting:
    """Mixed into a builder that goes through files: knows which one it is at."""

    reading: str | None = None

    def _generate_tables(self, **of_files: Any) -> Iterator[Any]:
        for name in {"files", "files_iterables"} & set(of_files):  # as the builder calls them
            of_files[name] = self.noted(of_files[name])
        try:
            yield from super()._generate_tables(**of_files)  # type: ignore[misc]
        except (ValueError, TypeError, KeyError, OSError) as error:  # Arrow's own among them
            if self.reading is None:
                raise
            raise Unreadable(f"{self.reading} ({type(error).__name__}: {error})") from error

    def noted(self, files: Iterable[Any]) -> Iterator[Any]:
        for file in files:
            if isinstance(file, str):
                self.reading = file
            yield file if isinstance(file, str) else self.noted(file)


class OnlyColumns(Noting):
    """Drops the columns that are not in the config's `columns` before they are compared."""

    config: Any
    info: Any

    def _cast_table(self, table: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.columns is not None:
            names = [c for c in table.column_names if c in self.config.columns]
            if not names:
                raise ValueError(
                    f"its columns are {', '.join(table.column_names)}; "
                    f"{' or '.join(self.config.columns)} is wanted"
                )
            table = table.select(names)
        return super()._cast_table(table, *args, **kwargs)  # type: ignore[misc]

    def _split_generators(self, dl_manager: Any) -> Any:
        splits = super()._split_generators(dl_manager)  # type: ignore[misc]
        if self.config.columns is not None and self.info.features is not None:
            kept = {k: v for k, v in self.info.features.items() if k in self.config.columns}
            self.info.features = datasets.Features(kept)
        return splits


@dataclass
class JsonColumnsConfig(JsonConfig):
    columns: list[str] | None = None


class JsonColumns(OnlyColumns, Json):
    BUILDER_CONFIG_CLASS = JsonColumnsConfig


@dataclass
class ArrowColumnsConfig(ArrowConfig):
    columns: list[str] | None = None


class ArrowColumns(OnlyColumns, Arrow):
    BUILDER_CONFIG_CLASS = ArrowColumnsConfig


class ParquetColumns(Noting, Parquet):  # which has `columns` of its own
    pass


class TextDocuments(Noting, Text):
    pass


BUILDERS = {
    "parquet": ParquetColumns,
    "json": JsonColumns,
    "arrow": ArrowColumns,
    "text": TextDocuments,
}
