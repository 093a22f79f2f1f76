"""The tokens of a model: what begins a window, and which ids the model has an embedding for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saeray.errors import bad_value
from saeray.spec.config import LanguageModelSAERunnerConfig


class Vocabulary:
    """A tokenizer beside the model it is used with."""

    def __init__(
        self,
        config: LanguageModelSAERunnerConfig,
        tokenizer: Any,
        n_embeddings: int | None,
        warn: Callable[[str], None],
    ) -> None:
        """n_embeddings: token ids from here on have no embedding in the model; None: all have.

        Raises:
            ConfigError: prepend_bos wants a BOS that the tokenizer or the model does not have.
        """
        self.config = config
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.n_embeddings = n_embeddings
        self.warn = warn
        self.without_embedding: set[int] = set()  # token ids seen, each warned of once
        self.bos = self.begins_windows() if config.prepend_bos else None

    def begins_windows(self) -> int:
        """The id of BOS, or of what stands in for it where the tokenizer has none."""
        name, bos = self.config.model_name, self.tokenizer.bos_token_id
        if bos is None:
            bos = self.tokenizer.eos_token_id
            if bos is None:
                raise bad_value("prepend_bos", True, f"{name} has no BOS token; set it to false.")
            self.warn(
                f"{name} has no BOS token; its EOS token {self.named(bos)} begins every window in "
                "its place (prepend_bos: false for none)."
            )
        if self.n_embeddings is not None and bos >= self.n_embeddings:
            raise bad_value(
                "prepend_bos",
                True,
                f"the tokenizer's {self.named(bos)} has no embedding in {name}, which has "
                f"{self.n_embeddings}; set it to false.",
            )
        return int(bos)

    def named(self, token_id: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(int(token_id))!r} (id {token_id})"

    def has_embeddings(self, ids: np.ndarray) -> bool:
        """Whether the model has one for every token of a document; warns of tokens it has not."""
        if self.n_embeddings is None or ids.max() < self.n_embeddings:
            return True
        for token_id in sorted({*ids[ids >= self.n_embeddings].tolist()} - self.without_embedding):
            self.without_embedding.add(token_id)
            self.warn(
                f"{self.config.dataset_path}: documents with {self.named(token_id)} are skipped; "
                f"{self.config.model_name} has embeddings for {self.n_embeddings} tokens only."
            )
        return False
