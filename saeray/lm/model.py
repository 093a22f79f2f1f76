"""The language model: hook points by their TransformerLens names, activations and spliced losses.

TransformerLens names the hooks and is the reference. The forward itself runs through the
underlying Hugging Face module with SDPA attention and stops at the last hook that is asked for;
at start-up that fast path is compared with `run_with_cache` on one batch, and where the two differ
beyond tolerance (or a hook has no counterpart) `run_with_cache` is used instead, with a warning.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from saeray.errors import ConfigError, bad_value, nearest
from saeray.lm.hooks import Hook, Probe, Replacement, attach, flat_heads, replaced, what_is_wrong
from saeray.lm.hub import load_tokenizer, official_name
from saeray.lm.load import (
    NOT_LOADED,
    choose_device,
    context_limit,
    fingerprint,
    fuse_gelu,
    load_model,
    sampled_fingerprint,
)
from saeray.spec.architectures import check_width
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import ModelFacts

logger = logging.getLogger(__name__)

# The two paths add in another order. Largest difference seen on GPT-2 shapes is 1e-5 of the
# activations' scale in float32 and about one unit in the last place of the half formats.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class _Reached(Exception):
    """Raised inside the forward when the last hook point has been read."""


class LanguageModel:
    """One loaded model that reads activations at, and splices replacements into, hook points."""

    def __init__(self, config: LanguageModelSAERunnerConfig, hook_points: Sequence[str]) -> None:
        """Loads the model in `activation_dtype` on `device` and finds the hook points.

        Raises:
            ConfigError: no such model, an unknown hook point (the near ones are listed), or a
                context_size beyond what the model can take.
        """
        from transformer_lens.model_bridge import TransformerBridge

        self.config = config
        self.warnings: list[str] = []
        self.hook_points = list(hook_points)
        self.device = choose_device(config.device)
        self.dtype = getattr(torch, config.activation_dtype)
        name = official_name(config.model_name)
        tokenizer = load_tokenizer(config)
        self.bos = tokenizer.bos_token_id
        self.model = load_model(config, name, self.dtype, self.warn)
        self.model.eval().requires_grad_(False).to(self.device)
        # The bridge rewires the module it is given, so it gets a twin that shares the weights.
        shared = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        twin = copy.deepcopy(self.model, memo=dict(shared))
        fuse_gelu(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.bridge = TransformerBridge.boot_transformers(
                    name,
                    hf_model=twin,
                    tokenizer=tokenizer,
                    device=self.device,
                    dtype=self.dtype,
                    trust_remote_code=config.trust_remote_code,
                )
            except NOT_LOADED as error:
                raise bad_value(
                    "model_name",
                    config.model_name,
                    f"TransformerLens, which names the hook points, can't take it: {error}",
                ) from None
        self.check_hook_points()
        self.check_context_size()
        self.facts = self.checked()

    def warn(self, text: str) -> None:
        logger.warning(text)
        self.warnings.append(text)

    # --- checks -----------------------------------------------------------------------------

    def check_hook_points(self) -> None:
        known = list(self.bridge.hook_dict)
        for hook_point in self.hook_points:
            if hook_point not in self.bridge.hook_dict:
                raise bad_value(
                    self.field_of(hook_point),
                    hook_point,
                    f"{self.config.model_name} ({self.bridge.cfg.n_layers} layers) has no such "
                    f"hook; {nearest(hook_point, known)}",
                )

    def field_of(self, hook_point: str) -> str:
        """Which field of the config named it."""
        return "hook_point_out" if hook_point in self.config.hooks_read[1:] else "hook_point"

    def check_context_size(self) -> None:
        limit = context_limit(self.model.config)
        if limit and self.config.context_size > limit:
            raise bad_value(
                "context_size",
                self.config.context_size,
                f"{self.config.model_name} takes at most {limit} tokens.",
            )

    def find_hooks(self) -> dict[str, Hook] | None:
        """Each hook point's place in the Hugging Face module; None if one has none."""
        hooks = {}
        for hook_point in self.hook_points:
            path, _, side = str(self.bridge.hook_dict[hook_point].name).rpartition(".")
            if side not in ("hook_in", "hook_out"):
                return None  # computed inside TransformerLens' own component
            try:
                remote = self.bridge.adapter.translate_transformer_lens_path(path)
                hooks[hook_point] = Hook(self.model.get_submodule(remote), side == "hook_in")
            except (AttributeError, ValueError, KeyError):
                return None
        return hooks

    @torch.inference_mode()
    def checked(self) -> ModelFacts:
        """Runs the hook points on random tokens, and keeps the fast path if both agree.

        Raises:
            ConfigError: a hook point that is not one vector per token, activations beyond what
                activation_dtype holds, or a context_size that the model can't take.
        """
        length = min(16, self.config.context_size)
        probes = [self.probe(2, length), self.probe(3, length - 1 or 2)]
        self.check_shapes(probes)
        slow = {h: flat_heads(probes[0].values[h]) for h in self.hook_points}
        self.hooks = self.find_hooks()
        fast_path = self.hooks is not None and self.fast_path_agrees(probes[0].tokens, slow)
        if fast_path:
            del self.bridge  # only the slow path needs it from here on
        else:
            why = (
                "not all of them are inputs or outputs of a Hugging Face module"
                if self.hooks is None
                else "the fast forward is not equal to TransformerLens' run_with_cache"
            )
            self.hooks = None
            self.warn(
                f"{self.config.model_name} at {', '.join(self.hook_points)}: {why}; using "
                "run_with_cache, which is slower."
            )
        self.check_whole_context()
        d_in = {h: int(slow[h].shape[-1]) for h in self.hook_points}
        return ModelFacts(
            d_in,
            self.d_vocab,
            fast_path,
            self.device.type,
            sum(p.numel() * p.element_size() for p in self.model.parameters()),
            tuple(self.warnings),
            tuple(h for h in probes[0].values if h in self.hook_points),
        )

    @property
    def d_vocab(self) -> int:
        """Rows of the embedding: every token id is below it."""
        return int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]

    def random_tokens(self, n: int, length: int) -> Tensor:
        """int64 [n, length], each window beginning with BOS as real ones do."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.d_vocab, (n, length), generator=generator)
        if self.config.prepend_bos and self.bos is not None and self.bos < self.d_vocab:
            tokens[:, 0] = self.bos  # where activations are largest in many models
        return tokens.to(self.device)

    def probe(self, n: int, length: int) -> Probe:
        tokens = self.random_tokens(n, length)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of hooks that are off; we say so ourselves
                return Probe(tokens, self.values(tokens, self.hook_points))
        except (*NOT_LOADED, IndexError) as error:
            raise bad_value(
                "model_name",
                self.config.model_name,
                f"TransformerLens, which names the hook points, can't run it: {error}",
            ) from None

    def check_shapes(self, probes: list[Probe]) -> None:
        for hook_point in self.hook_points:
            wrong = what_is_wrong(hook_point, probes)
            if wrong is not None:
                fit = self.names_that_fit([p.tokens for p in probes])
                raise bad_value(
                    self.field_of(hook_point),
                    hook_point,
                    f"{wrong} in {self.config.model_name}; {nearest(hook_point, fit)}",
                )
            value = probes[0].values[hook_point]
            self.check_finite(hook_point, value)
            if value.dim() > 3 and not hook_point.endswith("hook_z"):
                heads, d_head = value.shape[2:]
                self.warn(
                    f"{hook_point}: sae_lens has no counterpart to its {heads} heads of {d_head}, "
                    f"as it has for hook_z; there, give its SAEs [..., {heads * d_head}]."
                )

    def names_that_fit(self, tokens: list[Tensor]) -> list[str]:
        """The hook points that are one vector per token."""
        probes = [Probe(t, self.values(t, None)) for t in tokens]
        return [name for name in probes[0].values if what_is_wrong(name, probes) is None]

    def check_finite(self, hook_point: str, x: Tensor) -> None:
        """Raises a `ConfigError` where x holds an infinity or NaN."""
        # One pass and no copy; in float32 no sum of what float16 or real activations hold is
        # beyond its range.
        if math.isfinite(float(x.sum(dtype=torch.float32))):
            return
        if self.dtype is torch.float16:
            raise bad_value(
                "activation_dtype",
                self.config.activation_dtype,
                f"the activations of {self.config.model_name} at {hook_point} are beyond its range "
                "(65504); use bfloat16 or float32.",
            )
        raise bad_value(
            "model_name",
            self.config.model_name,
            f"its activations at {hook_point} are not finite with activation_dtype = "
            f"{self.config.activation_dtype}; its weights may be damaged.",
        )

    def check_whole_context(self) -> None:
        """One whole window through the model: a table of positions may end before it does."""
        try:
            self.activations(self.random_tokens(1, self.config.context_size))
        except (IndexError, RuntimeError, ValueError) as error:
            raise bad_value(
                "context_size",
                self.config.context_size,
                f"{self.config.model_name} can't take that many tokens: {error}",
            ) from None

    def fingerprints(self) -> tuple[str, str]:
        """Of what activations depend on, and what versions up to 0.1 had for it."""
        path = "fast" if self.facts.fast_path else "run_with_cache"
        return f"{path}:{fingerprint(self.model)}", f"{path}:{sampled_fingerprint(self.model)}"

    def fast_path_agrees(self, tokens: Tensor, slow: dict[str, Tensor]) -> bool:
        try:
            fast = self.run_to_hooks(tokens)
            return all(self.agree(fast[h], slow[h]) for h in self.hook_points)
        except (RuntimeError, TypeError, KeyError, IndexError, ValueError) as error:
            logger.warning("fast path failed (%s)", error)
            return False

    def agree(self, fast: Tensor, slow: Tensor) -> bool:
        if fast.shape != slow.shape:
            return False
        scale = slow.float().square().mean().sqrt()
        difference = (fast.float() - slow.float()).abs().max()
        return bool(difference <= TOLERANCE[self.dtype] * scale)

    # --- activations ------------------------------------------------------------------------

    @torch.inference_mode()
    def activations(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens [n, context] of int -> {hook point: [n * context, d_in]} in activation_dtype.

        Raises:
            ConfigError: a token without an embedding, or activations that are not finite.
        """
        beyond = int(tokens.max())
        if beyond >= self.d_vocab:
            raise bad_value(
                "model_name",
                self.config.model_name,
                f"has embeddings for {self.d_vocab} tokens, and the text has one of id {beyond}.",
            )
        tokens = tokens.to(self.device, torch.int64)
        got = self.run_with_cache(tokens) if self.hooks is None else self.run_to_hooks(tokens)
        got = {h: x.reshape(-1, x.shape[-1]).to(self.dtype) for h, x in got.items()}
        for hook_point, x in got.items():
            self.check_finite(hook_point, x)
        return got

    def run_with_cache(self, tokens: Tensor) -> dict[str, Tensor]:
        got = self.values(tokens, self.hook_points)
        return {h: flat_heads(got[h]) for h in self.hook_points}

    def values(self, tokens: Tensor, names: list[str] | None) -> dict[str, Tensor]:
        """What TransformerLens has at the hook points (None: at all), as it is there."""
        last = None
        if names is not None:
            # stop_at_layer leaves before the layer's own hooks, so the layer after the last one.
            layers = [h.split(".")[1] for h in names if h.startswith("blocks.")]
            last = max(map(int, layers)) + 1 if len(layers) == len(names) else None
        if last is not None and last >= self.bridge.cfg.n_layers:
            last = None
        _, cache = self.bridge.run_with_cache(
            tokens, names_filter=names, stop_at_layer=last, use_cache=False
        )
        return {name: value for name, value in cache.items() if isinstance(value, Tensor)}

    def run_to_hooks(self, tokens: Tensor) -> dict[str, Tensor]:
        assert self.hooks is not None
        got: dict[str, Tensor] = {}

        def keep(hook_point: str, value: Tensor) -> None:
            got[hook_point] = value
            if len(got) == len(self.hook_points):
                raise _Reached

        handles = [attach(hook, partial(keep, name)) for name, hook in self.hooks.items()]
        try:
            self.model(input_ids=tokens, use_cache=False)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {h: flat_heads(got[h]) for h in self.hook_points}

    # --- losses with something spliced in ---------------------------------------------------

    @torch.inference_mode()
    def logits(self, tokens: Tensor, splice: Mapping[str, Replacement] | None = None) -> Tensor:
        """tokens [n, context] -> logits [n, context, d_vocab] in float32, with replacements."""
        tokens = tokens.to(self.device, torch.int64)
        splice = splice or {}
        if self.hooks is None:
            return self.bridge.run_with_hooks(
                tokens,
                return_type="logits",
                fwd_hooks=[
                    (name, lambda value, hook, f=f: replaced(f, value))
                    for name, f in splice.items()
                ],
            ).float()
        handles = [attach(self.hooks[name], partial(replaced, f)) for name, f in splice.items()]
        try:
            return self.model(input_ids=tokens, use_cache=False).logits.float()
        finally:
            for handle in handles:
                handle.remove()


def check_d_in(config: LanguageModelSAERunnerConfig, facts: ModelFacts) -> int:
    """The width of the config's hook, after comparing it with `d_in`.

    Raises:
        ConfigError: `d_in` is given and is another number, or the device lacks `dtype`.
    """
    d_in = facts.d_in[config.resolved_hook_point]
    if config.d_in is not None and config.d_in != d_in:
        raise bad_value(
            "d_in",
            config.d_in,
            f"{config.resolved_hook_point} of {config.model_name} is {d_in} wide; write {d_in} or "
            "leave d_in out.",
        )
    if facts.device == "mps" and config.dtype == "float64":
        raise bad_value("dtype", config.dtype, "device mps has none; float32, or device: cpu.")
    if config.d_sae(d_in) < 1:
        raise ConfigError(f"expansion_factor = {config.expansion_factor}: d_sae would be 0.")
    check_width(config, d_in)
    return d_in
