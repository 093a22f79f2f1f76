"""Hook points: where they lie in the Hugging Face module, and what their values must look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

Replacement = Callable[[Tensor], Tensor]  # activations [n, context, d] -> what stands in for them


class Hook(NamedTuple):
    """Where a hook point lies in the Hugging Face module."""

    module: nn.Module
    is_input: bool  # the module's input, or its output


def attach(hook: Hook, f: Callable[[Tensor], Tensor | None]) -> Any:
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


class Probe(NamedTuple):
    """Random tokens [n, length], and the values of hook points on them as they came."""

    tokens: Tensor
    values: dict[str, Tensor]

    def shape(self, hook_point: str) -> list[int]:
        return list(self.values[hook_point].shape)


def is_per_token(hook_point: str, probes: list[Probe]) -> bool:
    """Whether each value is [n, length, d] or [n, length, heads, d_head] of floating point.

    The probes differ in both n and length, so no other dimension passes for one of these.
    """
    widths = set()
    for probe in probes:
        value = probe.values[hook_point]
        if value.shape[:2] != probe.tokens.shape or not value.dtype.is_floating_point:
            return False
        widths.add(value.shape[2:])
    return len(widths) == 1 and len(widths.pop()) in (1, 2)


def what_is_wrong(hook_point: str, probes: list[Probe]) -> str | None:
    """Why no SAE can be trained at a hook point; None where one can."""
    if any(hook_point not in probe.values for probe in probes):
        return "never computed in a forward pass, so it has no activations"
    if is_per_token(hook_point, probes):
        return None
    seen = " and ".join(
        f"{probe.shape(hook_point)} for {list(probe.tokens.shape)} tokens" for probe in probes
    )
    dtype = str(probes[0].values[hook_point].dtype).removeprefix("torch.")
    return (
        f"not one vector per token ([batch, position, d_in] or [batch, position, heads, d_head]) "
        f"but {seen}, of {dtype},"
    )
