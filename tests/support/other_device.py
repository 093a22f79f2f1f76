"""A device that is not the CPU, for machines that have none: as strict as mps, and it computes.

Its tensors wrap CPU tensors and say that they are on "meta"; operations on them run on the CPU. As
on mps there is no float64, and as on any device its tensors do not mix with those of the CPU.

    with OtherDevice():
        x = torch.ones(3).to(DEVICE)
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

DEVICE = torch.device("meta")


class There(torch.Tensor):
    """A tensor on that device."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), dtype=here.dtype, device=DEVICE
        )

    def __init__(self, here):
        if here.dtype is torch.float64:
            raise TypeError("a float64 tensor off the CPU")
        self.here = here

    def __repr__(self):
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class OtherDevice(TorchDispatchMode):
    """In force, tensors can be made on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with self:  # inference_mode hands on what is made of other operations, like `x.to(device)`
            out = func.decompose(*args, **(kwargs or {}))
        return run(func, args, kwargs or {}) if out is NotImplemented else out


def run(func, args, kwargs):
    """The operation on the wrapped tensors, its results where they belong."""
    flat, _ = tree_flatten((args, kwargs))
    there = [t for t in flat if isinstance(t, There)]
    to = kwargs.get("device")
    moved = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if there and not moved:
        mixed = [t for t in flat if type(t) in (torch.Tensor, torch.nn.Parameter) and t.dim() > 0]
        if mixed:
            raise RuntimeError(f"{func}: tensors of two devices")
    where = DEVICE if there else torch.device("cpu")
    if to is not None:
        where = torch.device(to)
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif func is torch.ops.aten.copy_.default:
        where = args[0].device
    plain_args, plain_kwargs = tree_map_only(There, lambda t: t.here, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    return placed(out, where, {id(t.here): t for t in there})


def placed(out, where, known):
    """Results as tensors of their device; those of in-place operations as the tensors they were."""
    flat, spec = tree_flatten(out)
    for i, t in enumerate(flat):
        if isinstance(t, torch.Tensor) and where == DEVICE:
            flat[i] = known[id(t)] if id(t) in known else There(t)
    return tree_unflatten(flat, spec)
