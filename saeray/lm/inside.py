"""An SAE inside its language model: what the model does with x̂ in the place of x, and latents.

    with spliced(sae) as inside:
        logits = inside("def f(x):")       # [1, n, d_vocab], with the SAE at its hook
        inside.latents                     # [1, n, d_sae], of that text
        inside.loss("def f(x):")           # nats per token

The model, its tokenizer and its hook are those of the harvesters. A transcoder reads at its hook
and writes at the one behind it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from saeray.errors import ConfigError, bad_value
from saeray.lm.hooks import attach, flat_heads
from saeray.lm.hub import load_tokenizer
from saeray.lm.load import context_limit
from saeray.lm.model import LanguageModel
from saeray.sae.architectures.base import SAE
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.synthetic import is_synthetic

# Of what an SAE was trained with, what its model is loaded by.
OF_THE_MODEL = (
    "model_name", "model_revision", "activation_dtype", "prepend_bos", "context_size",
)  # fmt: skip


def hooks_of(sae: SAE) -> tuple[str, str]:
    """Where an SAE reads, and where it writes.

    Raises:
        ConfigError: it does not say.
    """
    if sae.cfg is None or not sae.cfg.hook_name or not sae.cfg.model_name:
        raise ConfigError(f"{sae!r}: its cfg does not say which hook_name of which model it is of.")
    return sae.cfg.hook_name, sae.cfg.hook_name_out or sae.cfg.hook_name


def language_model(
    saes: SAE | Sequence[SAE], device: str | None = None, trust_remote_code: bool = False
) -> LanguageModel:
    """The language model of one SAE or several, loaded once for all of them.

    Args:
        device: cpu, cuda, mps or auto; default: where the first SAE is.
        trust_remote_code: whether a model's own code may run. An SAE's cfg.json, which may be
            anybody's, has no say in it.

    Raises:
        ConfigError: they are of different models, or of none; or it can't be loaded.
    """
    saes = [saes] if isinstance(saes, SAE) else list(saes)
    hooks = [hook for sae in saes for hook in hooks_of(sae)]
    names = dict.fromkeys(sae.cfg.model_name for sae in saes)
    if len(names) > 1:
        raise ConfigError(f"the SAEs are of several models: {', '.join(names)}.")
    cfg = saes[0].cfg
    if is_synthetic(cfg.model_name):
        raise bad_value("model_name", cfg.model_name, "there is no language model behind it.")
    known = cfg.training_config | {n: v for n, v in cfg.metadata.items() if n in OF_THE_MODEL}
    fields = {n: known[n] for n in OF_THE_MODEL if known.get(n) is not None}
    config = LanguageModelSAERunnerConfig(
        **fields,
        trust_remote_code=trust_remote_code,
        hook_point=hooks[0],
        dataset_path="",
        device=str(saes[0].device) if device is None else device,
    )
    return LanguageModel(config, list(dict.fromkeys(hooks)))


class Inside:
    """A language model with an SAE at work in it, as `spliced` gives it."""

    def __init__(self, model: LanguageModel, sae: SAE) -> None:
        self.sae = sae
        self.language_model = model
        self.reads, self.writes = hooks_of(sae)
        self.x: Tensor | None = None  # [n, context, d_in], what came in at the newest forward
        self.tokenizer = load_tokenizer(model.config)

    @property
    def latents(self) -> Tensor:
        """[n, context, d_sae], of the newest forward."""
        assert self.x is not None, "nothing was run yet"
        return self.sae.encode(self.x)

    @property
    def model(self) -> Any:
        """What runs: the Hugging Face module (for `generate`), or TransformerLens' bridge."""
        lm = self.language_model
        return lm.model if lm.hooks is not None else lm.bridge

    def tokens(self, text: str | Tensor) -> Tensor:
        """Text, or ids [context] or [n, context], as int64 [n, context] on the model's device.

        Text begins with the token that began every window of the training.

        Raises:
            ConfigError: more tokens than the model can take.
        """
        lm = self.language_model
        if isinstance(text, str):
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            bos = self.sae.cfg.metadata.get("bos_token_id", self.tokenizer.bos_token_id)
            if lm.config.prepend_bos and bos is not None:
                ids = [bos, *ids]
            text = torch.tensor(ids)
        elif not torch.is_tensor(text):
            raise bad_value(
                "text", text, "one text, or token ids, a tensor [n, context], for several."
            )
        tokens = torch.atleast_2d(text).to(lm.device, torch.int64)
        limit = context_limit(lm.model.config)
        if limit and tokens.shape[1] > limit:
            raise bad_value(
                "tokens", tokens.shape[1], f"{lm.config.model_name} takes at most {limit}."
            )
        return tokens

    def __call__(self, text: str | Tensor) -> Tensor:
        """Logits [n, context, d_vocab] in float32."""
        tokens = self.tokens(text)
        if self.language_model.hooks is None:
            return self.model(tokens, return_type="logits").float()
        return self.model(input_ids=tokens, use_cache=False).logits.float()

    def loss(self, text: str | Tensor) -> float:
        """Mean cross-entropy of the next token, nats."""
        tokens = self.tokens(text)
        with torch.no_grad():
            logits = self(tokens)[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))

    # --- at the hooks -----------------------------------------------------------------------

    def keep(self, value: Tensor) -> None:
        self.x = flat_heads(value).to(self.sae.device)

    def put(self, value: Tensor) -> Tensor:
        """What goes on in the place of what is at the hook."""
        if self.reads == self.writes:
            self.keep(value)
        assert self.x is not None, f"{self.reads} comes after {self.writes}"
        return self.sae(self.x).reshape(value.shape).to(value.device, value.dtype)

    def handlers(self, with_reconstruction: bool) -> list[tuple[str, Callable[[Tensor], Any]]]:
        reading: tuple[str, Callable[[Tensor], Any]] = (self.reads, self.keep)
        if not with_reconstruction:
            return [reading]
        writing = (self.writes, self.put)
        return [writing] if self.reads == self.writes else [reading, writing]


@contextlib.contextmanager
def spliced(
    sae: SAE,
    model: LanguageModel | None = None,
    device: str | None = None,
    reconstruction: bool = True,
) -> Iterator[Inside]:
    """Runs an SAE inside the language model at its hook.

    Args:
        model: of `language_model`, where it is loaded already (for several SAEs, say, or one that
            brings code of its own).
        device: of the model; default: where the SAE is.
        reconstruction: False leaves the model as it is, and only reads latents.

    Raises:
        ConfigError: the SAE's cfg names no hook point of a model, or the model has not loaded it.
    """
    lm = model if model is not None else language_model(sae, device)
    for hook in hooks_of(sae):
        if hook not in lm.hook_points:
            raise bad_value(
                "hook_name", hook, f"the model was loaded for {', '.join(lm.hook_points)}."
            )
    inside = Inside(lm, sae)
    handlers = inside.handlers(reconstruction)
    if lm.hooks is None:
        on = [(name, lambda value, hook, f=f: f(value)) for name, f in handlers]
        with lm.bridge.hooks(fwd_hooks=on):
            yield inside
        return
    attached = [attach(lm.hooks[name], f) for name, f in handlers]
    try:
        yield inside
    finally:
        for handle in attached:
            handle.remove()


@torch.no_grad()
def latents(sae: SAE, text: str | Tensor, model: LanguageModel | None = None) -> Tensor:
    """Feature activations [n, context, d_sae] of text, or of token ids [n, context].

    model: of `language_model`; loaded where it is not given.
    """
    with spliced(sae, model, reconstruction=False) as inside:
        inside(text)
        return inside.latents
