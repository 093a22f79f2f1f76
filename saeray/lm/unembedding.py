"""From a direction in the residual stream to the logits that it adds: the unembedding.

The convention is that of SAEDashboard, which loads its models by TransformerLens with the weights
processed: the final norm's scale is folded into the unembedding (and, where it is a LayerNorm, its
centring), the mean over the vocabulary is taken off, and what the norm divides by is left out. So
effects can be compared among tokens and features, but are not in nats.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from saeray.lm.model import LanguageModel

# Hook points whose values are added to, or are, the residual stream.
IN_THE_STREAM = re.compile(
    r"(blocks\.\d+\.(hook_resid_(pre|mid|post)|hook_attn_out|hook_mlp_out)|hook_embed)"
)


def reaches_logits(hook_point: str) -> bool:
    """Whether a vector at the hook point is one of the residual stream."""
    return IN_THE_STREAM.fullmatch(hook_point) is not None


@torch.inference_mode()
def folded_unembedding(model: LanguageModel) -> Tensor | None:
    """float32 [d_vocab, d_model] on the model's device; None where the model has no such matrix."""
    head: Any = model.model.get_output_embeddings()  # type: ignore[operator]
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2:
        return None
    folded = weight.float()
    norm = final_norm(model, head)
    if norm is not None:
        scale, centres = linear_part(norm, folded.shape[1])
        folded = folded * scale
        if centres:
            folded = folded - folded.mean(dim=1, keepdim=True)
    return folded - folded.mean(dim=0)


def final_norm(model: LanguageModel, head: nn.Module) -> nn.Module | None:
    """The norm whose output is what the unembedding takes; None where there is none."""
    seen: list[tuple[nn.Module, Tensor]] = []
    taken: list[Tensor] = []

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append((module, output))

    def take(_module: nn.Module, args: Any) -> None:
        taken.append(args[0])

    small = [m for m in model.model.modules() if not list(m.children())]
    handles: list[Any] = [m.register_forward_hook(keep) for m in small if m is not head]
    handles.append(head.register_forward_pre_hook(take))
    try:
        model.model(input_ids=model.random_tokens(1, 2), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    for module, output in reversed(seen):
        if output.shape == taken[0].shape and torch.equal(output, taken[0]):
            return module if is_norm(module, output.shape[-1]) else None
    return None


def probe(module: nn.Module, d_model: int) -> tuple[nn.Module, Tensor]:
    """The module in float32, and a vector [1, 1, d_model] that any norm leaves as it is: ±1."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    signs = torch.ones(1, 1, d_model, device=device)
    signs[..., 1::2] = -1
    return copy.deepcopy(module).float(), signs


def is_norm(module: nn.Module, d_model: int) -> bool:
    """Whether the module's output does not depend on the length of what it is given."""
    in_float, x = probe(module, d_model)
    return torch.allclose(in_float(x), in_float(3 * x), rtol=1e-3, atol=1e-4)


def linear_part(norm: nn.Module, d_model: int) -> tuple[Tensor, bool]:
    """(scale [d_model] of a norm, whether it takes the mean off first), however it stores them."""
    in_float, x = probe(norm, d_model)
    shift = (in_float(x) + in_float(-x)) / 2
    scale = ((in_float(x) - shift) / x).flatten()
    even = in_float(torch.ones_like(x)) - shift  # a LayerNorm makes nothing of equal numbers
    return scale, bool(even.abs().max() < 1e-3 * scale.abs().max())
