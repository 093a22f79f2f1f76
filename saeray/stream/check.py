"""The checks of activation streams that need their models and texts, before any of them runs."""

from __future__ import annotations

from collections.abc import Sequence

from saeray.lm.hub import embedding_rows, load_tokenizer
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import ModelFacts
from saeray.spec.plan import hook_points_of
from saeray.text.tokens import TokenWindows

Configs = Sequence[LanguageModelSAERunnerConfig]


def check_models(streams: Sequence[Configs]) -> list[ModelFacts]:
    """Facts of each stream's model, after comparing hook points and d_in with it.

    Models are loaded one after the other, and once where streams differ in their text only.

    Raises:
        ConfigError: a model, a hook point or d_in is wrong.
    """
    from saeray.lm.model import LanguageModel, check_d_in

    known: dict[object, ModelFacts] = {}
    found = []
    for configs in streams:
        c, hooks = configs[0], hook_points_of(configs)
        key = (
            c.model_name, c.model_revision, c.trust_remote_code, c.activation_dtype, c.device,
            c.context_size, tuple(hooks),
        )  # fmt: skip
        if key not in known:
            known[key] = LanguageModel(c, hooks).facts
        for config in configs:
            check_d_in(config, known[key])
        found.append(known[key])
    return found


def check_texts(configs: Configs) -> list[str]:
    """Opens the text of each of these configs; what is odd about them.

    Raises:
        ConfigError: a dataset that can't be used, or a tokenizer that can't be loaded.
    """
    odd: list[str] = []
    for config in configs:
        rows = embedding_rows(config)
        TokenWindows(config, load_tokenizer(config), n_embeddings=rows, warn=odd.append)
    return odd
