"""The checks of activation streams that need their models and texts, before any of them runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from saeray.lm.hub import embedding_rows, load_tokenizer
from saeray.spec.coefficients import MeanNorms
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import ModelFacts
from saeray.spec.plan import hook_points_of
from saeray.spec.synthetic import is_synthetic
from saeray.spec.transcoder import check_order, d_out
from saeray.text.row_numbers import RowNumbers
from saeray.text.served import ServedRows
from saeray.text.tokens import TokenWindows

if TYPE_CHECKING:
    from saeray.lm.model import LanguageModel
    from saeray.lm.synthetic import SyntheticModel

Configs = Sequence[LanguageModelSAERunnerConfig]
MEASURED_DOCUMENTS = 256  # of a text, by which its length is told
MEASURED_TOKENS = 4096  # of held-out text, at most, for the norms of activations


def check_models(
    streams: Sequence[Configs], norms: dict[tuple[str, str], MeanNorms] | None = None
) -> list[ModelFacts]:
    """Facts of each stream's model, after comparing hook points and d_in with it.

    Models are loaded one after the other, and once where streams differ in their text only.

    norms: where given, filled by model name and hook point, on the text of the first stream that
    has the model.

    Raises:
        ConfigError: a model, a hook point or d_in is wrong.
    """

    known: dict[object, ModelFacts] = {}
    found = []
    for configs in streams:
        c, hooks = configs[0], hook_points_of(configs)
        key = (
            c.model_name, c.model_revision, c.trust_remote_code, c.activation_dtype, c.device,
            c.context_size, tuple(hooks),
        )  # fmt: skip
        if key not in known:
            model = open_model(c, hooks)
            known[key] = model.facts
            if norms is not None:
                norms |= {(c.model_name, h): n for h, n in mean_norms(model).items()}
        for config in configs:
            check_config(config, known[key])
        found.append(known[key])
    return found


def open_model(
    config: LanguageModelSAERunnerConfig, hook_points: Sequence[str]
) -> LanguageModel | SyntheticModel:
    """The model that a config names.

    Raises:
        ConfigError: it can't be used; see `LanguageModel`.
    """
    if is_synthetic(config.model_name):
        from saeray.lm.synthetic import SyntheticModel

        return SyntheticModel(config, hook_points)
    from saeray.lm.model import LanguageModel

    return LanguageModel(config, hook_points)


def check_config(config: LanguageModelSAERunnerConfig, facts: ModelFacts) -> None:
    """One SAE's config against its model, and against the SAE that it starts from.

    Raises:
        ConfigError: d_in is wrong, or what depends on it; or there is no such SAE to start from.
    """
    from saeray.files.init_from import started_from
    from saeray.lm.model import check_d_in

    d_in = check_d_in(config, facts)
    check_order(config, facts.computed)
    if config.init_from is not None:
        started_from(config, d_in, d_out=d_out(config, facts.d_in))


def mean_norms(model: LanguageModel | SyntheticModel) -> dict[str, MeanNorms]:
    """Of activations of the held-out text of the model's config, at each of its hook points."""
    import torch

    c = model.config
    text = open_text(c, lambda _: None)
    windows = text.evaluation()[: max(1, MEASURED_TOKENS // c.context_size)]
    served, at = ServedRows.of(text), None
    if served is not None and served.mask(windows).any():
        at = torch.from_numpy(np.flatnonzero(served.mask(windows)))
    found = {}
    for hook_point, x in model.activations(torch.from_numpy(windows.copy())).items():
        rows = x.float() if at is None else x[at.to(x.device)].float()
        centred = torch.linalg.vector_norm(rows - rows.mean(dim=0), dim=1)
        plain = torch.linalg.vector_norm(rows, dim=1)
        found[hook_point] = MeanNorms(len(rows), float(plain.mean()), float(centred.mean()))
    return found


def check_texts(configs: Configs, epochs: list[str] | None = None) -> list[str]:
    """Opens the text of each of these configs; what is odd about them.

    epochs: where given, gets of each text how often it is read, in words.

    Raises:
        ConfigError: a dataset that can't be used, a tokenizer that can't be loaded, or a choice of
            rows that leaves none.
    """
    odd: list[str] = []
    for config in configs:
        text = open_text(config, odd.append)
        ServedRows.of(text)
        if epochs is not None:
            epochs.append(how_often(config, text))
    return odd


def how_often(config: LanguageModelSAERunnerConfig, text: TokenWindows | RowNumbers) -> str:
    """About how many epochs of its text a stream is, by some of its documents."""
    if isinstance(text, RowNumbers):
        return "none: the model is synthetic"
    if text.rows.n_rows is None:
        return "it streams, so its length is not known; at its end the next epoch begins"
    found = text.length(MEASURED_DOCUMENTS)
    assert config.stream_tokens is not None
    served, per_row, more = ServedRows.of(text), 1.0, ""
    if served is not None:
        per_row = 1 / float(served.mask(text.evaluation()).mean())
        more = f", at {per_row:.3f} tokens for each row that is served, as in the held-out text"
    times = config.stream_tokens * per_row / max(1.0, found.tokens)
    about = "" if found.documents <= MEASURED_DOCUMENTS else "about "
    return (
        f"{about}{found.tokens:,.0f} tokens in {found.documents:,} documents to train on, so "
        f"{config.stream_tokens:,} are {times:.2g} epochs{more}"
    )


def open_text(
    config: LanguageModelSAERunnerConfig, warn: Callable[[str], None]
) -> TokenWindows | RowNumbers:
    if is_synthetic(config.model_name):
        return RowNumbers(config)
    rows = embedding_rows(config)
    return TokenWindows(config, load_tokenizer(config), n_embeddings=rows, warn=warn)
