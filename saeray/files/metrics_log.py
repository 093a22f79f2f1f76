"""metrics.jsonl: a line per report of one SAE, and how it is read back."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeray.files import strict_json
from saeray.files.storage import Folder
from saeray.spec.metric_names import by_prefix

FLUSH_SECONDS = 30.0  # between puts of a metrics.jsonl to an object store

# saeray 0.1 up to November 2026 gave the mean per token the name that the field has for the ratio
# of sums. What it wrote is read under the name it has now; the other one it did not measure.
RENAMED = {
    "explained_variance": "explained_variance_per_token",
    "explained_variance_std": "explained_variance_per_token_std",
}


def with_names_of_now(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Figures that an earlier version may have written, by the names they have now."""
    new = {prefix + key: prefix + name for key, name in RENAMED.items()}
    if not any(key in values for key in new) or any(name in values for name in new.values()):
        return values
    return {new.get(key, key): value for key, value in values.items()}


def line_of(text: str) -> dict[str, Any] | None:
    """A line of a metrics.jsonl; None for one that was cut off by a crash."""
    try:
        line = strict_json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        return None
    return by_prefix(with_names_of_now(line, "metrics/"))


def text_of(line: Mapping[str, Any]) -> str:
    return strict_json.dumps(line, sort_keys=True)


def read_lines(folder: Folder) -> list[dict[str, Any]]:
    """Of the SAE with this folder; none where nothing was logged yet."""
    if "metrics.jsonl" not in folder.names():
        return []
    texts = folder.read("metrics.jsonl").decode(errors="replace").splitlines()
    return [line for line in map(line_of, texts) if line is not None]


def cut(folder: Folder, step: int) -> None:
    """Takes the lines after a step out of the log of the SAE with this folder."""
    lines = [line for line in read_lines(folder) if line["step"] <= step]
    if "metrics.jsonl" in folder.names():
        folder.write("metrics.jsonl", "".join(text_of(line) + "\n" for line in lines).encode())


class MetricsLog:
    """metrics.jsonl while it is written. Steps logged before a restart are not logged again."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.last_step = -1
        self.written_step = -1  # up to which lines are where they survive this process
        self.flushed = time.monotonic()
        if "metrics.jsonl" not in folder.names():
            return
        found = folder.read("metrics.jsonl").decode(errors="replace").splitlines()
        for line in filter(None, map(line_of, found)):
            self.last_step = max(self.last_step, line["step"])
            self.lines.append(text_of(line))
        self.written_step = self.last_step
        if self.lines != found:
            folder.write("metrics.jsonl", "".join(line + "\n" for line in self.lines).encode())

    def append(self, step: int, record: Mapping[str, Any], last: bool = False) -> bool:
        """Adds a line unless that step has one; says whether it did.

        last: of an SAE that ends. Where it was stopped at the step of the newest line, that line is
        replaced: this one has the figures of the end, too.
        """
        line = text_of({"step": step, **record})
        if last and step == self.last_step and self.lines and line != self.lines[-1]:
            self.replace_newest(line)
            return True
        if step <= self.last_step:
            return False
        self.last_step = step
        self.lines.append(line)
        if self.folder.is_local:
            os.makedirs(self.folder.path, exist_ok=True)
            with open(Path(self.folder.path) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(self.lines[-1] + "\n")
            self.written_step = step
        elif time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()
        return True

    def replace_newest(self, line: str) -> None:
        self.lines[-1] = line
        self.folder.write("metrics.jsonl", "".join(line + "\n" for line in self.lines).encode())
        self.written_step, self.flushed = self.last_step, time.monotonic()

    def flush(self) -> None:
        """Object stores can't append: there the whole file is put again."""
        if not self.folder.is_local and self.written_step < self.last_step:
            self.folder.write("metrics.jsonl", "".join(line + "\n" for line in self.lines).encode())
            self.written_step, self.flushed = self.last_step, time.monotonic()
