"""From a model's name to its Hugging Face module, and what its config says of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saeray.errors import bad_value
from saeray.spec.config import LanguageModelSAERunnerConfig, digest

# What loaders raise over a model they can't take: each has its own words.
NOT_LOADED = (
    OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, TypeError,
)  # fmt: skip


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


def load_model(
    config: LanguageModelSAERunnerConfig,
    name: str,
    dtype: torch.dtype,
    warn: Callable[[str], None],
) -> nn.Module:
    """The Hugging Face model, with SDPA attention where its class has it.

    Classes that have none are those it can't serve (Gemma-2's soft-capped scores, say). Weights
    that are in none of its files are random then, which is warned of.

    Raises:
        ConfigError: it can't be loaded.
    """
    from transformers import AutoModelForCausalLM

    def load(attention: str) -> tuple[nn.Module, dict[str, Any]]:
        return AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=attention,
            revision=config.model_revision,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )

    try:
        try:
            model, info = load("sdpa")
        except (ValueError, KeyError, ImportError):
            model, info = load("eager")
    except NOT_LOADED as error:
        raise bad_value("model_name", config.model_name, f"can't be loaded: {error}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        warn(
            f"{config.model_name}: {', '.join(missing[:3])}{more} are not in its files, so these "
            "weights are random."
        )
    return model


def context_limit(config: Any) -> int | None:
    """The longest context a Hugging Face config declares; None where the model has no limit.

    TransformerLens has a number for every model, made up where there is none.
    """
    text = config.get_text_config()
    if getattr(text, "alibi", False):
        return None  # biases by distance, whatever the config says of positions
    for name in ("max_position_embeddings", "max_seq_len"):  # the latter is MPT's, a table
        limit = getattr(text, name, None)
        if isinstance(limit, int):
            return limit
    return None


def fuse_gelu(model: nn.Module) -> None:
    """Replaces Hugging Face's tanh GELU, eight elementwise passes, by PyTorch's single one.

    A third of a GPT-2 MLP's time on a CPU goes into those passes. Equal up to rounding, which the
    check of the fast path holds.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))


def fingerprint(model: nn.Module) -> str:
    """A hash of all that activations depend on: every byte of the weights, and the config.

    Of the weights as they were loaded, so whatever kind of files they came from; half a second per
    GB.
    """
    seen = hashlib.sha256()
    config = model.config.to_diff_dict()  # type: ignore[operator, union-attr]
    for irrelevant in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(irrelevant, None)
    seen.update(digest(config, 64).encode())
    saved = model.state_dict().keys()
    tensors: dict[str, Tensor] = dict(model.named_parameters())  # tied ones once
    tensors |= {name: b for name, b in model.named_buffers() if name in saved}
    for name, t in sorted(tensors.items()):
        seen.update(f"{name}{tuple(t.shape)}{t.dtype}".encode())
        seen.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()[:32]


def sampled_fingerprint(model: nn.Module) -> str:
    """What versions up to 0.1 had for it, by which their caches are found: a short hash of
    every parameter's name and shape and of 1,024 of its values."""
    seen = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        values = p.detach().flatten()
        values = values[:: max(1, len(values) // 1024)].float().cpu().contiguous()
        seen.update(f"{name}{tuple(p.shape)}".encode())
        seen.update(values.numpy().tobytes())
    return seen.hexdigest()[:16]
