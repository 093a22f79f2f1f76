"""How much `datasets` has read of its sources in this process: a sign of life before any row.

A row group of a parquet file may be hundreds of megabytes, which come over a network long before
its first row does.
"""

from __future__ import annotations

import builtins
import sys
from typing import Any

BUILDERS = ("arrow", "json", "parquet", "text")  # of `datasets`, which open files themselves


class Counted:
    """A file whose reads are counted."""

    total = 0  # bytes (of text: characters) by all of them

    def __init__(self, file: Any) -> None:
        self.file = file

    def read(self, *arguments: Any) -> Any:
        data = self.file.read(*arguments)
        Counted.total += len(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __iter__(self) -> Any:
        return iter(self.file)

    def __enter__(self) -> Counted:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self.file.__exit__(*error)


def count_reads() -> None:
    """From now on what is streamed is counted. Call it once a streaming dataset has been opened.

    `datasets` gives those modules an `open` of their own by then, which opens URLs as well.
    """
    for name in BUILDERS:
        module: Any = sys.modules.get(f"datasets.packaged_modules.{name}.{name}")
        opens = getattr(module, "open", builtins.open)
        if opens is not builtins.open and not isinstance(opens, CountingOpen):
            module.open = CountingOpen(opens)


class CountingOpen:
    def __init__(self, opens: Any) -> None:
        self.opens = opens

    def __call__(self, *arguments: Any, **options: Any) -> Counted:
        return Counted(self.opens(*arguments, **options))
