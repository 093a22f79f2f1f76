"""A dataset of the Hugging Face hub: a split of it, or what the hub has made of its script."""

from __future__ import annotations

from typing import Any

from saeray.errors import bad_value
from saeray.spec.config import LanguageModelSAERunnerConfig

CONVERSION = "refs/convert/parquet"  # the branch where the hub keeps its own parquet files


class LoadingScript(Exception):
    """The hub has a script where `datasets` wants data; says which."""


def from_hub(config: LanguageModelSAERunnerConfig, name: str, revision: str | None) -> Any:
    """The dataset of that name.

    Raises:
        ConfigError: not there, no such split, or the hub can't be reached.
        LoadingScript: `datasets` runs no scripts any more.
    """
    import datasets

    streaming = True if config.streaming is None else config.streaming
    try:
        return datasets.load_dataset(
            name,
            config.dataset_config,
            split=config.dataset_split,
            streaming=streaming,
            revision=revision,
        )
    except Exception as error:  # datasets raises anything from ValueError to OSError here
        raise bad_value(
            "dataset_path",
            name,
            f"neither a local path nor to be had from the hub ({type(error).__name__}: {error}).",
        ) from None
