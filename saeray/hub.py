"""Names of models and datasets: local paths or the Hugging Face hub. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from saeray.config import LanguageModelSAERunnerConfig
from saeray.errors import bad_value


def looks_local(name: str) -> bool:
    """Whether a model or dataset name is meant as a path rather than a hub name."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or Path(name).exists()


def official_name(model_name: str) -> str:
    """Resolves TransformerLens aliases (`gpt2-small` -> the hub's name); checks local paths.

    Raises:
        ConfigError: a local path that is not a Hugging Face directory.
    """
    path = Path(model_name).expanduser()
    if looks_local(model_name):
        if not path.is_dir():
            raise bad_value("model_name", model_name, "there is no such directory.")
        if not (path / "config.json").is_file():
            raise bad_value(
                "model_name",
                model_name,
                "the directory has no config.json; a Hugging Face model directory is wanted.",
            )
        return str(path)
    from transformer_lens.tools.model_registry.registry_io import resolve_model_alias

    return resolve_model_alias(model_name) or model_name


def load_tokenizer(config: LanguageModelSAERunnerConfig) -> Any:
    """The model's Hugging Face tokenizer. Imports no torch."""
    from transformers import AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name = official_name(config.model_name)
    try:
        return AutoTokenizer.from_pretrained(
            name, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise bad_value(
            "model_name", config.model_name, f"its tokenizer can't be loaded: {error}"
        ) from None
