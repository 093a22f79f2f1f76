"""The dataset that text comes from: local or remote files, a saved dataset, or a hub name."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saeray.errors import ConfigError, bad_value
from saeray.lm.hub import here, looks_local, nowhere
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.text.columns import choose_columns
from saeray.text.data_files import (
    ONE_SPLIT,
    DataFiles,
    bad_split,
    blamed,
    local_files,
    remote_files,
)
from saeray.text.hub_dataset import CONVERSION, conversion, from_hub, unlisted_conversion
from saeray.text.remote_files import is_remote
from saeray.text.rows import Unreadable

JSON_BYTES = 2**20  # that are read at a time where they stream: rows come that much sooner
FIRST_BYTES = 2**20  # of a .txt file, that tell whether it has blank lines


def open_dataset(config: LanguageModelSAERunnerConfig) -> Any:
    """The `datasets` object of dataset_path: files, a saved dataset, or a hub name.

    Raises:
        ConfigError: no such path, split or column, no readable file in it, or the hub can't be
            reached.
        LoadingScript: the hub has only a script for it (see `open_conversion`).
    """
    import datasets

    datasets.disable_progress_bars()
    path = here(config.dataset_path).removeprefix("file://")
    if is_remote(path):
        only_of_hub(config, "dataset_config", "dataset_revision")
        return from_files(config, remote_files(path), streaming=config.streaming is not False)
    if not looks_local(path):
        return from_hub(config, path)
    local = Path(path).expanduser()
    if not local.exists():
        raise bad_value("dataset_path", path, nowhere("file or directory"))
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        only_of_hub(config, "dataset_config", "dataset_revision")
        return saved(config, datasets.load_from_disk(str(local)))
    # Of a folder, a README.md may tell configurations.
    only_of_hub(config, *(["dataset_config"] if local.is_file() else []), "dataset_revision")
    files = local_files(config, local)
    if config.text_version == 1:
        config = config.replace(dataset_split=ONE_SPLIT)
    return from_files(config, files, streaming=bool(config.streaming))


def only_of_hub(config: LanguageModelSAERunnerConfig, *names: str) -> None:
    """Refuses fields that would be ignored for what dataset_path is."""
    for name in names:
        value = getattr(config, name)
        if value is not None and config.text_version > 1:
            raise bad_value(
                name, value, f"{config.dataset_path} has none, not being a hub name; leave it out."
            )


def open_conversion(config: LanguageModelSAERunnerConfig) -> tuple[Any, str]:
    """The hub's own parquet files of a dataset that is a script there, and which they are.

    Raises:
        ConfigError: the hub has none, or no such split or configuration.
    """
    try:
        found = conversion(config)
    except ConfigError:
        raise
    except Exception as error:  # of huggingface_hub, or of what it asks the hub with
        return unlisted_conversion(config, error), f"{CONVERSION} of the hub is read"
    return from_files(config, found.files, config.streaming is not False), found.words


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
            options["columns"] = wanted_columns(config, files.builder, next(iter(wanted.values())))
        if files.builder == "json" and streaming and config.text_version > 1:
            options["chunksize"] = JSON_BYTES
        builder = read_by(files.builder, wanted, **options)
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)
    except ConfigError:
        raise
    except Exception as error:  # datasets raises anything from ValueError to OSError here
        what = f"can't be read as {files.builder}: {real_cause(error)}."
        raise blamed(config, error) or bad_value("dataset_path", path, what) from None


def read_by(builder: str, splits: Mapping[str, list[str]], **options: Any) -> Any:
    """A builder of `datasets` over the files of some splits."""
    from saeray.text.builders import BUILDERS

    # Local names are patterns to `datasets`, so one with a bracket would not be found.
    files = {
        name: [f if is_remote(f) else glob.escape(f) for f in of_split]
        for name, of_split in splits.items()
    }
    return BUILDERS[builder](dataset_name=builder, hash="saeray", data_files=files, **options)


def wanted_columns(
    config: LanguageModelSAERunnerConfig, builder: str, files: list[str]
) -> list[str]:
    """The columns that text or tokens are in, as the first file that holds a row tells.

    Raises:
        ConfigError: there is none.
    """
    for file in files:
        stream = read_by(builder, {ONE_SPLIT: [file]}).as_streaming_dataset(split=ONE_SPLIT)
        row = next(iter(stream), None)
        if row is not None:
            return choose_columns(config, list(row), stream).names
    raise bad_value("dataset_path", config.dataset_path, "the dataset is empty.")


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
