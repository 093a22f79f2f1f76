"""Names of models and datasets: local paths or the Hugging Face hub. Imports no torch.

`saeray:models/tiny-python` is a path inside the package, wherever a process has it: what is bundled
is found on every node of a cluster.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from saeray.errors import bad_value
from saeray.spec.config import LanguageModelSAERunnerConfig

PACKAGE = Path(__file__).resolve().parent.parent
BUNDLED = "saeray:"


def here(name: str) -> str:
    """A name with `saeray:` replaced by where this process has the package."""
    return str(PACKAGE / name.removeprefix(BUNDLED)) if name.startswith(BUNDLED) else name


def portable(path: Path) -> str:
    """A path as other machines can have it too, if it is one inside the package."""
    absolute = path.expanduser().absolute()
    try:
        return BUNDLED + absolute.resolve().relative_to(PACKAGE).as_posix()
    except ValueError:
        return str(absolute)


def nowhere(kind: str) -> str:
    """What to say of a path that is not there, on whichever machine this is."""
    anywhere = "a hub name" if kind == "directory" else "a hub name or s3://"
    return (
        f"there is no such {kind} on {platform.node()}; on a cluster local paths are those of its "
        f"own nodes ({anywhere} is the same everywhere)."
    )


def looks_local(name: str) -> bool:
    """Whether a model or dataset name is meant as a path rather than a hub name."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or Path(name).exists()


def official_name(model_name: str) -> str:
    """Resolves TransformerLens aliases (`gpt2-small` -> the hub's name); checks local paths.

    Raises:
        ConfigError: a local path that is not a Hugging Face directory.
    """
    name = here(model_name)
    path = Path(name).expanduser()
    if looks_local(name):
        if not path.is_dir():
            raise bad_value("model_name", model_name, nowhere("directory"))
        if not (path / "config.json").is_file():
            raise bad_value(
                "model_name",
                model_name,
                "the directory has no config.json; a Hugging Face model directory is wanted.",
            )
        return str(path)
    from transformer_lens.tools.model_registry.registry_io import resolve_model_alias

    return resolve_model_alias(model_name) or model_name


def embedding_rows(config: LanguageModelSAERunnerConfig) -> int | None:
    """How many token ids the model has embeddings for, as its config says.

    Tokenizers may have more: tokens that somebody has added and the model was never told of.
    """
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(
            official_name(config.model_name),
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError, KeyError, ImportError):
        return None  # where the model is loaded, it is said what is wrong
    rows = getattr(found.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


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
