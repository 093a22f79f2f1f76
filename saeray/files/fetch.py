"""Brings a sweep's folder home: file by file, in pieces, each published by rename."""

from __future__ import annotations

import os
import sys
from pathlib import Path, PurePosixPath

from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder

# What is written anew with the same name, and may have the same size.
GROWING = (
    "sweep.yaml",
    "metrics.jsonl",
    "results.csv",
    "results.parquet",
    "account.json",
    "report.html",
)
PIECE = 16 * 2**20  # bytes at a time: what a Ray Client carries well


def went_on(source: Folder, target: Folder) -> set[str]:
    """SAEs whose rows are others than when they were fetched: their weights may be, too."""
    then, now = (
        {row["trial"]: row | {"path": None} for row in SweepFolder(of, of.name).read_rows()}
        for of in (target, source)
    )
    return {trial for trial, row in now.items() if trial in then and then[trial] != row}


def fetch_folder(source: Folder, target: Folder, checkpoints: bool = False) -> tuple[int, int]:
    """Copies the files of a sweep to a local folder; (files, bytes) that were copied.

    Files that are there with the same size are left, so a fetch that was cut off goes on. What only
    concerns a running sweep (`.ray/`) stays, and checkpoints do unless they are asked for.
    """
    n_files = n_bytes = 0
    trained_on = went_on(source, target)
    for name, size in sorted(source.files().items()):
        parts = PurePosixPath(name).parts
        if (
            parts[0] == ".ray"
            or name.endswith(".tmp")
            or ("checkpoints" in parts and not checkpoints)
        ):
            continue
        place = Path(target.path) / name
        growing = name.endswith(GROWING) or (parts[0] == "trials" and parts[1] in trained_on)
        if place.is_file() and place.stat().st_size == size and not growing:
            continue
        copy(source, name, size, place)
        n_files, n_bytes = n_files + 1, n_bytes + size
    print(f"fetched {n_files} files, {n_bytes:,} bytes, to {target.path}", file=sys.stderr)
    return n_files, n_bytes


def copy(source: Folder, name: str, size: int, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(place.name + ".part")
    with open(part, "wb") as file:
        while file.tell() < size:
            piece = source.read(name, file.tell(), min(PIECE, size - file.tell()))
            if not piece:
                raise OSError(f"{source.uri}/{name}: ends after {file.tell()} of {size} bytes")
            file.write(piece)
    os.replace(part, place)
