"""The language model: hook points by their TransformerLens names, activations and spliced losses.

TransformerLens names the hooks and is the reference. The forward itself runs through the
underlying Hugging Face module with SDPA attention and stops at the last hook that is asked for;
at start-up that fast path is compared with `run_with_cache` on one batch, and where the two differ
beyond tolerance (or a hook has no counterpart) `run_with_cache` is used instead, with a warning.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saeray.errors import ConfigError, bad_value, nearest
from saeray.lm.hub import load_tokenizer, official_name
from saeray.spec.config import LanguageModelSAERunnerConfig

logger = logging.getLogger(__name__)

# The two paths add in another order. Largest difference seen on GPT-2 shapes is 1e-5 of the
# activations' scale in float32 and about one unit in the last place of the half formats.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Replacement = Callable[[Tensor], Tensor]  # activations [n, context, d] -> what stands in for them


class ModelFacts(NamedTuple):
    """What the rest of a sweep needs to know about the model."""

    d_in: dict[str, int]  # per hook point
    d_vocab: int
    fast_path: bool
    fingerprint: str  # of the weights and of how the forward runs: what activations depend on
    device: str  # kind: cpu, cuda or mps
    parameter_bytes: int  # of the weights


class _Reached(Exception):
    """Raised inside the forward when the last hook point has been read."""


class _Hook(NamedTuple):
    """Where a hook point lies in the Hugging Face module."""

    module: nn.Module
    is_input: bool  # the module's input, or its output


def choose_device(device: str) -> torch.device:
    """ "auto" takes cuda, then mps, then cpu.

    Raises:
        ConfigError: a device this machine does not have.
    """
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    have = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    kind = device.split(":")[0]
    if not have.get(kind, False):
        there = ", ".join(name for name, is_there in have.items() if is_there)
        raise bad_value("device", device, f"this machine has {there}; or auto.")
    return torch.device(device)


class LanguageModel:
    """One loaded model that reads activations at, and splices replacements into, hook points."""

    def __init__(self, config: LanguageModelSAERunnerConfig, hook_points: Sequence[str]) -> None:
        """Loads the model in `activation_dtype` on `device` and finds the hook points.

        Raises:
            ConfigError: no such model, an unknown hook point (the near ones are listed), or a
                context_size beyond what the model can take.
        """
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoModelForCausalLM

        self.config = config
        self.hook_points = list(hook_points)
        self.device = choose_device(config.device)
        self.dtype = getattr(torch, config.activation_dtype)
        name = official_name(config.model_name)
        tokenizer = load_tokenizer(config)
        try:
            self.model: nn.Module = AutoModelForCausalLM.from_pretrained(
                name,
                dtype=self.dtype,
                attn_implementation="sdpa",
                revision=config.model_revision,
                trust_remote_code=config.trust_remote_code,
            )
        except (OSError, ValueError) as error:
            raise bad_value("model_name", config.model_name, f"can't be loaded: {error}") from None
        self.model.eval().requires_grad_(False).to(self.device)
        # The bridge rewires the module it is given, so it gets a twin that shares the weights.
        shared = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()]}
        twin = copy.deepcopy(self.model, memo=dict(shared))
        fuse_gelu(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.bridge = TransformerBridge.boot_transformers(
                name,
                hf_model=twin,
                tokenizer=tokenizer,
                device=self.device,
                dtype=self.dtype,
                trust_remote_code=config.trust_remote_code,
            )
        self.check_hook_points()
        self.check_context_size()
        self.hooks = self.find_hooks()
        self.facts = self.check_fast_path()

    # --- checks -----------------------------------------------------------------------------

    def check_hook_points(self) -> None:
        known = list(self.bridge.hook_dict)
        for hook_point in self.hook_points:
            if hook_point not in self.bridge.hook_dict:
                raise bad_value(
                    "hook_point",
                    hook_point,
                    f"{self.config.model_name} ({self.bridge.cfg.n_layers} layers) has no such "
                    f"hook; {nearest(hook_point, known)}",
                )

    def check_context_size(self) -> None:
        limit = self.bridge.cfg.n_ctx
        if limit and self.config.context_size > limit:
            raise bad_value(
                "context_size",
                self.config.context_size,
                f"{self.config.model_name} takes at most {limit} tokens.",
            )

    def find_hooks(self) -> dict[str, _Hook] | None:
        """Each hook point's place in the Hugging Face module; None if one has none."""
        hooks = {}
        for hook_point in self.hook_points:
            path, _, side = str(self.bridge.hook_dict[hook_point].name).rpartition(".")
            if side not in ("hook_in", "hook_out"):
                return None  # computed inside TransformerLens' own component
            try:
                remote = self.bridge.adapter.translate_transformer_lens_path(path)
                hooks[hook_point] = _Hook(self.model.get_submodule(remote), side == "hook_in")
            except (AttributeError, ValueError, KeyError):
                return None
        return hooks

    @torch.inference_mode()
    def check_fast_path(self) -> ModelFacts:
        """Compares both paths on one batch of tokens and keeps the fast one if they agree."""
        generator = torch.Generator().manual_seed(0)
        d_vocab = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        length = min(16, self.config.context_size)
        tokens = torch.randint(0, d_vocab, (2, length), generator=generator).to(self.device)
        slow = self.run_with_cache(tokens)
        fast_path = False
        if self.hooks is not None:
            try:
                fast = self.run_to_hooks(tokens)
                fast_path = all(self.agree(fast[h], slow[h]) for h in self.hook_points)
            except (RuntimeError, TypeError, KeyError, IndexError) as error:
                logger.warning("fast path failed (%s)", error)
        if fast_path:
            del self.bridge  # only the slow path needs it from here on
        else:
            self.hooks = None
            logger.warning(
                "%s at %s: the fast forward is not equal to TransformerLens' run_with_cache; "
                "using run_with_cache, which is slower.",
                self.config.model_name,
                ", ".join(self.hook_points),
            )
        d_in = {h: int(slow[h].shape[-1]) for h in self.hook_points}
        path = "fast" if fast_path else "run_with_cache"
        return ModelFacts(
            d_in,
            d_vocab,
            fast_path,
            f"{path}:{fingerprint(self.model)}",
            self.device.type,
            sum(p.numel() * p.element_size() for p in self.model.parameters()),
        )

    def agree(self, fast: Tensor, slow: Tensor) -> bool:
        if fast.shape != slow.shape:
            return False
        scale = slow.float().square().mean().sqrt()
        difference = (fast.float() - slow.float()).abs().max()
        return bool(difference <= TOLERANCE[self.dtype] * scale)

    # --- activations ------------------------------------------------------------------------

    @torch.inference_mode()
    def activations(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens [n, context] of int -> {hook point: [n * context, d_in]} in activation_dtype."""
        tokens = tokens.to(self.device, torch.int64)
        got = self.run_with_cache(tokens) if self.hooks is None else self.run_to_hooks(tokens)
        return {h: x.reshape(-1, x.shape[-1]).to(self.dtype) for h, x in got.items()}

    def run_with_cache(self, tokens: Tensor) -> dict[str, Tensor]:
        # stop_at_layer leaves before the layer's own hooks, so the layer after the last one.
        layers = [h.split(".")[1] for h in self.hook_points if h.startswith("blocks.")]
        last = max(map(int, layers)) + 1 if len(layers) == len(self.hook_points) else None
        if last is not None and last >= self.bridge.cfg.n_layers:
            last = None
        _, cache = self.bridge.run_with_cache(
            tokens, names_filter=self.hook_points, stop_at_layer=last
        )
        return {h: flat_heads(cache[h]) for h in self.hook_points}

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


def fuse_gelu(model: nn.Module) -> None:
    """Replaces Hugging Face's tanh GELU, eight elementwise passes, by PyTorch's single one.

    A third of a GPT-2 MLP's time on a CPU goes into those passes. Equal up to rounding, which the
    check of the fast path holds.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))


def attach(hook: _Hook, f: Callable[[Tensor], Tensor | None]) -> Any:
    """Calls f on the module's input or output; what f returns (if anything) replaces it."""
    if hook.is_input:

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                new = f(args[0])
                return None if new is None else ((new, *args[1:]), kwargs)
            new = f(kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})

        return hook.module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            new = f(output[0])
            return None if new is None else (new, *output[1:])
        return f(output)

    return hook.module.register_forward_hook(after)


def replaced(f: Replacement, value: Tensor) -> Tensor:
    """f on the flat activations, in the shape and dtype the model goes on with."""
    return f(flat_heads(value)).reshape(value.shape).to(value.dtype)


def flat_heads(x: Tensor) -> Tensor:
    """[n, context, heads, d_head] -> [n, context, heads * d_head]; others as they are."""
    return x.flatten(2) if x.dim() > 3 else x


def fingerprint(model: nn.Module) -> str:
    """A short hash of every parameter's name and shape and of 1,024 of its values."""
    seen = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        values = p.detach().flatten()
        values = values[:: max(1, len(values) // 1024)].float().cpu().contiguous()
        seen.update(f"{name}{tuple(p.shape)}".encode())
        seen.update(values.numpy().tobytes())
    return seen.hexdigest()[:16]


def check_d_in(config: LanguageModelSAERunnerConfig, facts: ModelFacts) -> int:
    """The width of the config's hook, after comparing it with `d_in`.

    Raises:
        ConfigError: `d_in` is given and is another number.
    """
    d_in = facts.d_in[config.resolved_hook_point]
    if config.d_in is not None and config.d_in != d_in:
        raise bad_value(
            "d_in",
            config.d_in,
            f"{config.resolved_hook_point} of {config.model_name} is {d_in} wide; write {d_in} or "
            "leave d_in out.",
        )
    if config.d_sae(d_in) < 1:
        raise ConfigError(f"expansion_factor = {config.expansion_factor}: d_sae would be 0.")
    return d_in
