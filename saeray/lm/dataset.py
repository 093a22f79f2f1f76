"""The dataset that text comes from: local or remote files, a saved dataset, or a hub name.

Files are divided into splits as `datasets.load_dataset(folder)` does it: by their names, those of
their folders, or what a README.md there says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from saeray.errors import ConfigError, bad_value
from saeray.lm.columns import MASK_COLUMN, TEXT_COLUMNS, TOKEN_COLUMNS, no_column
from saeray.lm.hub import here, looks_local, nowhere
from saeray.lm.remote_files import is_remote, mounted
from saeray.lm.rows import Unreadable
from saeray.spec.config import LanguageModelSAERunnerConfig

LOADERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".arrow": "arrow",
}  # datasets' own builders, by suffix (also behind .gz and .zst)
ONE_SPLIT = "train"  # what files without splits of their own are
FIRST_BYTES = 2**20  # of a .txt file, that tell whether it has blank lines


class DataFiles(NamedTuple):
    """The files of a dataset: the builder that reads them, and those of each split."""

    builder: str
    splits: Mapping[str, list[str]]


def open_dataset(config: LanguageModelSAERunnerConfig) -> Any:
    """The `datasets` object of dataset_path: files, a saved dataset, or a hub name.

    Raises:
        ConfigError: no such path, split or column, no readable file in it, or the hub can't be
            reached.
        LoadingScript: the hub has only a script for it (see `open_conversion`).
    """
    import datasets

    datasets.disable_progress_bars()
    path = here(config.dataset_path)
    if is_remote(path):
        return from_files(config, remote_files(path), streaming=config.streaming is not False)
    if not looks_local(path):
        from saeray.lm.hub_dataset import from_hub

        return from_hub(config, path, config.dataset_revision)
    local = Path(path).expanduser()
    if not local.exists():
        raise bad_value("dataset_path", path, nowhere("file or directory"))
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        return saved(config, datasets.load_from_disk(str(local)))
    return from_files(config, local_files(config, local), streaming=bool(config.streaming))


def saved(config: LanguageModelSAERunnerConfig, found: Any) -> Any:
    """What `save_to_disk` has left: a split of several, or a dataset that is only one."""
    split = config.dataset_split
    if isinstance(found, dict):  # a DatasetDict
        if split not in found:
            raise bad_split(config, list(found))
        return found[split]
    name = str(found.split or ONE_SPLIT)
    if split not in (ONE_SPLIT, name):
        raise bad_split(config, [name])
    return found


def from_files(config: LanguageModelSAERunnerConfig, files: DataFiles, streaming: bool) -> Any:
    """The dataset in these files; only the columns that may be wanted are read.

    Raises:
        ConfigError: it has no such split or column, or a file can't be read, and which.
    """
    path, split = config.dataset_path, config.dataset_split
    wanted = {n: files.splits[n] for n in re.findall(r"\w[\w.-]*", split) if n in files.splits}
    if not wanted:
        raise bad_split(config, list(files.splits))
    if files.builder == "parquet" and is_empty_parquet(next(iter(wanted.values()))):
        raise bad_value("dataset_path", path, "the dataset is empty.")
    try:
        options: dict[str, Any] = {}
        if files.builder == "text":
            options["sample_by"] = documents_of_txt(config, next(iter(wanted.values())))
        else:
            options["columns"] = wanted_columns(config, read_by(files.builder, wanted))
        builder = read_by(files.builder, wanted, **options)
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except ConfigError:
        raise
    except Exception as error:  # datasets raises anything from ValueError to OSError here
        if is_about_split(error):
            raise bad_value("dataset_split", split, f"{path}: {one_paragraph(error)}") from None
        raise bad_value(
            "dataset_path", path, f"can't be read as {files.builder}: {real_cause(error)}."
        ) from None


def read_by(builder: str, splits: Mapping[str, list[str]], **options: Any) -> Any:
    """A builder of `datasets` over the files of some splits."""
    from saeray.lm.builders import BUILDERS

    files = {name: list(of_split) for name, of_split in splits.items()}
    return BUILDERS[builder](dataset_name=builder, hash="saeray", data_files=files, **options)


def wanted_columns(config: LanguageModelSAERunnerConfig, unread: Any) -> list[str]:
    """Those of the columns (of the first file) that text or tokens may be in.

    Raises:
        ConfigError: there is none.
    """
    stream = unread.as_streaming_dataset(split=next(iter(unread.config.data_files)))
    names = stream.column_names or list(next(iter(stream), {}))
    if not names:
        raise bad_value("dataset_path", config.dataset_path, "the dataset is empty.")
    named = config.text_column
    candidates = [named] if named is not None else [*TOKEN_COLUMNS, *TEXT_COLUMNS]
    found = [c for c in candidates if c in names]
    if not found:
        raise no_column(config, names)
    return [*found, *([MASK_COLUMN] if MASK_COLUMN in names and MASK_COLUMN not in found else [])]


def documents_of_txt(config: LanguageModelSAERunnerConfig, files: list[str]) -> str:
    """What `datasets` shall take for a document: a `paragraph`, a `line` or the `document`."""
    if config.text_version == 1:
        return "line"
    if config.txt_documents is not None:
        return {"blank_line": "paragraph", "file": "document"}.get(config.txt_documents, "line")
    import fsspec

    with fsspec.open(files[0], "rb", compression="infer") as file:
        beginning = file.read(FIRST_BYTES).replace(b"\r\n", b"\n")
    return "paragraph" if b"\n\n" in beginning.strip() else "line"


def real_cause(error: BaseException) -> str:
    """What went wrong, without the words that `datasets` puts around it."""
    while error.__cause__ is not None and not isinstance(error, Unreadable):
        error = error.__cause__
    return str(error) if isinstance(error, Unreadable) else f"{type(error).__name__}: {error}"


def one_paragraph(error: Exception) -> str:
    """What `datasets` says, without its line breaks and examples."""
    return " ".join(str(error).partition("Example of usage")[0].split())


def is_about_split(error: Exception) -> bool:
    """Whether `datasets` says that there is no such split, or no such part of it."""
    return isinstance(error, ValueError) and bool(
        re.search(r"^(Unknown split|Bad split|Unrecognized instruction format)", str(error))
    )


def bad_split(config: LanguageModelSAERunnerConfig, splits: list[str]) -> ConfigError:
    there = ", ".join(map(str, splits))
    return bad_value("dataset_split", config.dataset_split, f"{config.dataset_path} has: {there}.")


# --- which files there are ------------------------------------------------------------------


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
    except datasets.exceptions.DataFilesNotFoundError:
        found = {ONE_SPLIT: [str(f.absolute()) for f in files]}  # in hidden folders, say
    except ValueError as error:  # several configurations, or none of that name
        said = f"{path}: {one_paragraph(error)}"
        raise bad_value("dataset_config", config.dataset_config, said) from None
    return DataFiles(
        builder,
        {
            str(split): [str(f) for f in files if str(f.absolute()) in set(of_split)]
            for split, of_split in found.items()
        },
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
    from datasets.data_files import DataFilesDict, get_data_patterns

    found = DataFilesDict.from_patterns(get_data_patterns(root.url), base_path=root.url)
    return DataFiles(
        builder,
        {str(s): [u for u in urls if u in set(of_split)] for s, of_split in found.items()},
    )


def data_files(path: str, files: list[Path]) -> tuple[list[Path], str]:
    """The data files among those at a path, and the `datasets` builder that reads them."""

    def builder(file: Path) -> str | None:
        suffixes = [s for s in file.suffixes if s not in (".gz", ".zst")]
        return LOADERS.get(suffixes[-1]) if suffixes else None

    found = [(f, builder(f)) for f in files]
    kinds = sorted({b for _, b in found if b})
    if not kinds:
        raise bad_value("dataset_path", path, f"holds no file that ends in {', '.join(LOADERS)}.")
    if len(kinds) > 1:
        raise bad_value(
            "dataset_path", path, f"mixes {' and '.join(kinds)} files; point at one kind."
        )
    return [f for f, b in found if b], kinds[0]


def is_empty_parquet(files: list[str]) -> bool:
    """Whether there is not one row; `datasets` then fails with a word about batch sizes."""
    import fsspec
    import pyarrow.parquet

    try:
        for name in files:
            with fsspec.open(name, "rb") as file:
                if pyarrow.parquet.read_metadata(file).num_rows:
                    return False
        return True
    except (OSError, ValueError):
        return False  # not parquet at all: the loader says so
