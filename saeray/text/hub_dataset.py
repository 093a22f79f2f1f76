"""A dataset of the Hugging Face hub, or what the hub itself has made of a loading script."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple
from urllib.parse import quote

from saeray.errors import bad_value
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.text.data_files import DataFiles, blamed, one_paragraph

CONVERSION = "refs/convert/parquet"  # the branch where the hub keeps its own parquet files
SCRIPT = r"scripts? (are|is) no longer supported|contains custom code|loading script"


class LoadingScript(Exception):
    """The hub has a script where `datasets` wants data; says what it said."""


class Conversion(NamedTuple):
    files: DataFiles
    words: str  # what it is, for a warning


def from_hub(config: LanguageModelSAERunnerConfig, name: str) -> Any:
    """The dataset of that name.

    Raises:
        ConfigError: not there, no such split, or the hub can't be reached.
        LoadingScript: the hub has only a script, and `datasets` runs none any more.
    """
    revision = config.dataset_revision
    if revision == CONVERSION:
        raise LoadingScript(f"dataset_revision is {CONVERSION}")
    try:
        return loaded(config, name, revision)
    except Exception as error:  # datasets raises anything from ValueError to OSError here
        said = f"{type(error).__name__}: {one_paragraph(error)}"
        if re.search(SCRIPT, str(error)):
            if revision is None:
                raise LoadingScript(one_paragraph(error)) from None
            raise bad_value(
                "dataset_revision",
                revision,
                f"of {name} is a loading script ({said}); without it the hub's own conversion of "
                "the dataset is read.",
            ) from None
        if revision is not None and revision in str(error):
            raise bad_value("dataset_revision", revision, f"of {name}: {said}.") from None
        raise blamed(config, error) or bad_value(
            "dataset_path", name, f"neither a local path nor to be had from the hub ({said})."
        ) from None


def loaded(config: LanguageModelSAERunnerConfig, name: str, revision: str | None) -> Any:
    import datasets

    return datasets.load_dataset(
        name,
        config.dataset_config,
        split=config.dataset_split,
        streaming=True if config.streaming is None else config.streaming,
        revision=revision,
    )


def conversion(config: LanguageModelSAERunnerConfig) -> Conversion:
    """The parquet files that the hub has made of a dataset, by split.

    They are <configuration>/<split>/0000.parquet, of large datasets only the first part, in
    partial-<split>.

    Raises:
        ConfigError: there are none, or no such configuration. Anything else: they are not listed.
    """
    from huggingface_hub import HfApi

    name, wanted = config.dataset_path, config.dataset_config
    tree = HfApi().list_repo_tree(name, recursive=True, revision=CONVERSION, repo_type="dataset")
    paths = sorted(item.path for item in tree if item.path.endswith(".parquet"))
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for path in paths:
        of_config, split, *_ = path.split("/")
        url = f"hf://datasets/{name}@{quote(CONVERSION, safe='')}/{path}"
        found[of_config][split.removeprefix("partial-")].append(url)
    if not found:
        raise no_conversion(name, "it holds no parquet file")
    chosen = wanted or (next(iter(found)) if len(found) == 1 else "default")
    if chosen not in found:
        raise bad_value("dataset_config", wanted, f"{name} has: {', '.join(found)}.")
    words = f"the hub's own conversion of it is read ({CONVERSION}, {chosen})"
    if any(f"/partial-{config.dataset_split}/" in p for p in paths if p.startswith(f"{chosen}/")):
        words += ", which has only a first part of it"
    return Conversion(DataFiles("parquet", found[chosen]), words)


def unlisted_conversion(config: LanguageModelSAERunnerConfig, why: Exception) -> Any:
    """The hub's parquet files as `datasets` finds them itself: offline, in its cache.

    Raises:
        ConfigError: there are none.
    """
    try:
        return loaded(config, config.dataset_path, CONVERSION)
    except Exception as error:
        raise blamed(config, error) or no_conversion(
            config.dataset_path, f"{type(why).__name__}: {one_paragraph(why)}"
        ) from None


def no_conversion(name: str, why: str) -> Exception:
    return bad_value(
        "dataset_path",
        name,
        f"is a loading script, which `datasets` does not run any more, and the hub has no "
        f"conversion of it in {CONVERSION} ({why}); another copy of the text is wanted.",
    )
