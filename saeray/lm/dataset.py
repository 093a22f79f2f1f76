"""The dataset that text comes from: local files, a saved dataset or a hub name, and its column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saeray.errors import bad_value
from saeray.lm.hub import here, looks_local, nowhere
from saeray.spec.config import LanguageModelSAERunnerConfig

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text",)
LOADERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
    ".arrow": "arrow",
}  # datasets' own builders, by suffix (also behind .gz and .zst)


def open_dataset(config: LanguageModelSAERunnerConfig) -> Any:
    """The `datasets` object of dataset_path: local files, a saved dataset, or a hub name.

    Raises:
        ConfigError: no such path, no readable file in it, or the hub can't be reached.
    """
    import datasets

    datasets.disable_progress_bars()
    path, split = here(config.dataset_path), config.dataset_split
    if not looks_local(path):
        streaming = True if config.streaming is None else config.streaming
        try:
            return datasets.load_dataset(
                path, config.dataset_config, split=split, streaming=streaming
            )
        except Exception as error:  # datasets raises anything from ValueError to OSError here
            raise bad_value(
                "dataset_path",
                path,
                f"neither a local path nor to be had from the hub ({type(error).__name__}: "
                f"{error}).",
            ) from None
    local = Path(path).expanduser()
    if not local.exists():
        raise bad_value("dataset_path", path, nowhere("file or directory"))
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        saved = datasets.load_from_disk(str(local))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise bad_value("dataset_split", split, f"{path} holds {', '.join(saved)}.")
            return saved[split]
        return saved
    files, builder = data_files(local)
    if builder == "parquet" and is_empty_parquet(files):
        raise bad_value("dataset_path", path, "the dataset is empty.")
    try:
        # With data_files all of them form one split, always called "train".
        return datasets.load_dataset(
            builder,
            data_files=[str(f) for f in files],
            split="train",
            streaming=bool(config.streaming),
        )
    except Exception as error:
        raise bad_value(
            "dataset_path", path, f"can't be read as {builder} ({type(error).__name__}: {error})."
        ) from None


def data_files(path: Path) -> tuple[list[Path], str]:
    """The data files at a path and the `datasets` builder that reads them."""

    def builder(file: Path) -> str | None:
        suffixes = [s for s in file.suffixes if s not in (".gz", ".zst")]
        return LOADERS.get(suffixes[-1]) if suffixes else None

    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    found = [(f, builder(f)) for f in files]
    kinds = sorted({b for _, b in found if b})
    if not kinds:
        raise bad_value(
            "dataset_path", str(path), f"holds no file that ends in {', '.join(LOADERS)}."
        )
    if len(kinds) > 1:
        raise bad_value(
            "dataset_path", str(path), f"mixes {' and '.join(kinds)} files; point at one kind."
        )
    return [f for f, b in found if b], kinds[0]


def is_empty_parquet(files: list[Path]) -> bool:
    """Whether there is not one row; `datasets` then fails with a word about batch sizes."""
    import pyarrow.parquet

    try:
        return sum(pyarrow.parquet.read_metadata(f).num_rows for f in files) == 0
    except (OSError, ValueError):
        return False  # not parquet at all: the loader says so


def choose_column(config: LanguageModelSAERunnerConfig, columns: list[str]) -> tuple[str, bool]:
    """The column to read and whether it holds tokens.

    Raises:
        ConfigError: no such column, or `is_dataset_tokenized` contradicts what is there.
    """
    have = f"{config.dataset_path} has the columns {', '.join(columns)}"
    if config.text_column is not None:
        if config.text_column not in columns:
            raise bad_value("text_column", config.text_column, f"{have}.")
        return config.text_column, bool(
            config.text_column in TOKEN_COLUMNS
            if config.is_dataset_tokenized is None
            else config.is_dataset_tokenized
        )
    tokens = next((c for c in TOKEN_COLUMNS if c in columns), None)
    text = next((c for c in TEXT_COLUMNS if c in columns), None)
    if config.is_dataset_tokenized is True and tokens is None:
        raise bad_value("is_dataset_tokenized", True, f"{have}, but no tokens or input_ids.")
    if config.is_dataset_tokenized is False and text is None:
        raise bad_value("is_dataset_tokenized", False, f"{have}, but no text.")
    if tokens is not None and config.is_dataset_tokenized is not False:
        return tokens, True
    if text is not None:
        return text, False
    raise bad_value(
        "dataset_path",
        config.dataset_path,
        f"the columns are {', '.join(columns)}; one called tokens, input_ids or text is wanted, "
        "or name yours in text_column.",
    )
