"""The data files at a path or URI, by split, and what `datasets` says is wrong with them.

Files are divided into splits as `datasets.load_dataset(folder)` does it: by their names, those of
their folders, or what a README.md there says.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from saeray.errors import ConfigError, bad_value
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.text.remote_files import is_remote, mounted

LOADERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".arrow": "arrow",
}  # datasets' own builders, by suffix (also behind .gz and .zst)
NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json")  # but words about it
ONE_SPLIT = "train"  # what files without splits of their own are


class DataFiles(NamedTuple):
    """The files of a dataset: the builder that reads them, and those of each split."""

    builder: str
    splits: Mapping[str, list[str]]


def local_files(config: LanguageModelSAERunnerConfig, path: Path) -> DataFiles:
    """The data files at a local path, by split.

    Raises:
        ConfigError: none, several kinds of them, or no such `dataset_config`.
    """
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    files, builder = data_files(str(path), files)
    if path.is_file() or config.text_version == 1:
        return DataFiles(builder, {ONE_SPLIT: [str(f) for f in files]})
    import datasets

    try:
        found = datasets.load_dataset_builder(str(path), config.dataset_config).config.data_files
    except FileNotFoundError:  # brackets in the path, hidden folders
        names = by_split([f.relative_to(path).as_posix() for f in files])
        found = {s: [str((path / n).absolute()) for n in of] for s, of in names.items()}
    except ValueError as error:  # several configurations, or none of that name
        raise blamed(config, error) or bad_value("dataset_path", str(path), str(error)) from None
    splits = {str(split): set(of_split) for split, of_split in found.items()}
    return DataFiles(
        builder,
        {s: [str(f) for f in files if str(f.absolute()) in splits[s]] for s in splits},
    )


def remote_files(uri: str) -> DataFiles:
    """The data files at a URI, by split.

    Raises:
        ConfigError: nothing there, several kinds, or a scheme that can't be read.
    """
    root = mounted(uri, "dataset_path")
    files, builder = data_files(uri, root.files)
    urls = [root.url_of(file.as_posix()) for file in files]
    if root.is_file:
        return DataFiles(builder, {ONE_SPLIT: urls})
    names = [file.as_posix() for file in files]
    return DataFiles(
        builder,
        {s: list(map(root.url_of, of_split)) for s, of_split in by_split(names).items()},
    )


def by_split(names: list[str]) -> dict[str, list[str]]:
    """Relative paths by the split that they tell.

    `datasets` looks through a folder dozens of times for that; it is shown one of empty files.
    """
    import fsspec
    from datasets.data_files import DataFilesDict, get_data_patterns

    memory = fsspec.filesystem("memory")
    root = f"/saeray-{uuid.uuid4().hex}"
    try:
        for name in names:
            memory.pipe_file(f"{root}/{name}", b"")
        url = f"memory:/{root}"
        found = DataFilesDict.from_patterns(get_data_patterns(url), base_path=url)
    except FileNotFoundError:  # what `datasets` does not look at, such as hidden folders
        return {ONE_SPLIT: names}
    finally:
        memory.rm(root, recursive=True)
    splits = {str(s): {u.partition(root)[2][1:] for u in urls} for s, urls in found.items()}
    return {s: [n for n in names if n in of_split] for s, of_split in splits.items()}


def data_files(path: str, files: list[Path]) -> tuple[list[Path], str]:
    """The data files among those at a path, and the `datasets` builder that reads them."""

    def builder(file: Path) -> str | None:
        name = file.name.partition("?")[0] if is_remote(path) else file.name  # of a URL's query
        suffixes = [s for s in Path(name).suffixes if s not in (".gz", ".zst")]
        return LOADERS.get(suffixes[-1]) if suffixes else None

    found = [(f, builder(f)) for f in files if f.name not in NO_DATA]
    kinds = sorted({b for _, b in found if b})
    if not kinds:
        raise bad_value("dataset_path", path, f"holds no file that ends in {', '.join(LOADERS)}.")
    if len(kinds) > 1:
        raise bad_value(
            "dataset_path", path, f"mixes {' and '.join(kinds)} files; point at one kind."
        )
    return [f for f, b in found if b], kinds[0]


# --- what is wrong with them ----------------------------------------------------------------


def bad_split(config: LanguageModelSAERunnerConfig, splits: list[str]) -> ConfigError:
    there = ", ".join(map(str, splits))
    return bad_value("dataset_split", config.dataset_split, f"{config.dataset_path} has: {there}.")


def blamed(config: LanguageModelSAERunnerConfig, error: Exception) -> ConfigError | None:
    """The error of the field that `datasets` complains of, where it is split or configuration."""
    said = f"{config.dataset_path}: {one_paragraph(error)}"
    if re.match(r"Unknown split|Bad split|Unrecognized instruction format", str(error)):
        return bad_value("dataset_split", config.dataset_split, said)
    if re.match(r"Config name is missing|BuilderConfig .* not found", str(error)):
        return bad_value("dataset_config", config.dataset_config, said)
    return None


def one_paragraph(error: Exception) -> str:
    """What `datasets` says, without its line breaks and examples."""
    return " ".join(str(error).partition("Example of usage")[0].split()).rstrip(".")
