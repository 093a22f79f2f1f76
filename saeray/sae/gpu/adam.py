"""Adam in one pass over the weights on a GPU, and bfloat16 copies of them.

`SAETrainer.finish_step` walks W_dec and its gradient five times: the component along the row,
the clipping, Adam, the norm, the scaling. Here a row is read once and written once, and its
bfloat16 copy, which the next step's products read, with it.

Uses Triton, and imports it only when something is computed. D = d_in, L = d_sae.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.gradients import Gradients

ADAM_EPSILON = 1e-8


def rows_of(W_enc: Tensor) -> Tensor:
    """W_enc [D, L] as the [L, D] it is in memory.

    Raises:
        ValueError: it is kept in another way.
    """
    rows = W_enc.t()
    if not rows.is_contiguous() or rows.dtype != torch.float32:
        raise ValueError("the sparse step needs W_enc in float32, a row per feature in memory")
    return rows


class HalfWeights:
    """bfloat16 copies [L, D] of both weights of one SAE. `fused_adam_rows` keeps them up to date.

    They save reading float32 weights to round them in every step. Whatever else changes the
    weights through torch, is noticed by the version torch counts.
    """

    def __init__(self, sae: SAE) -> None:
        shape, device = (sae.d_sae, sae.d_in), sae.W_enc.device
        self.W_enc = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.W_dec = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.versions: tuple[int, int] | None = None

    def refresh(self, sae: SAE) -> None:
        if self.versions != _versions(sae):
            self.W_enc.copy_(rows_of(sae.W_enc))
            self.W_dec.copy_(sae.W_dec)
            self.versions = _versions(sae)


def _versions(sae: SAE) -> tuple[int, int]:
    return (sae.W_enc._version, sae.W_dec._version)


def power_of_two(n: int) -> int:
    """The next one from n: what a block of Triton is as wide as."""
    return 1 << (n - 1).bit_length()


def of_rows(D: int, elements_per_warp: int) -> dict[str, int]:
    """How programs that hold rows of D are compiled: the row's width, and warps."""
    width = max(32, power_of_two(D))
    return dict(WIDTH=width, num_warps=min(16, max(1, width // elements_per_warp)))


def run(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launches it. Multiply-adds are fused, whatever a version of Triton does by default."""
    kernel[grid](*args, enable_fp_fusion=True, **constants)


def adam_rates(lr: float, beta1: float, beta2: float, step: int) -> tuple[float, float]:
    """What changes from step to step, of which 1 is the first."""
    return lr / (1 - beta1**step), math.sqrt(1 - beta2**step)


def fused_adam_rows(
    sae: SAE,
    grad: Gradients,
    moments: Mapping[str, tuple[Tensor, Tensor]],
    rates: Tensor,
    *,
    beta1: float,
    beta2: float,
    unit: bool,
    gradient_clip: float = 0.0,
    half: HalfWeights | None = None,
) -> None:
    """Adam on all four parameters, each row read and written once.

    The same as, one after another: removing the component of W_dec's gradient along the row,
    clipping the norm of the whole gradient, `torch.optim.Adam`, scaling W_dec's rows to norm 1
    (the first and the last where `unit`). The gradients are left as they are. Where they are not
    valid, so is everything else.

    moments: exp_avg and exp_avg_sq of each parameter, laid out as it. rates [2]: `adam_rates`, in
    the GPU's memory, so that a CUDA graph of this step serves for all.
    """
    from saeray.sae.gpu.gradient_kernels import adam_rows

    parts = (
        (rows_of(sae.W_enc), rows_of(grad.W_enc), [rows_of(m) for m in moments["W_enc"]], False),
        (sae.W_dec, grad.W_dec, list(moments["W_dec"]), unit),
        (sae.b_enc, grad.b_enc, list(moments["b_enc"]), False),
        (sae.b_dec, grad.b_dec, list(moments["b_dec"]), False),
    )
    copies = (half.W_enc, half.W_dec, None, None) if half is not None else (None,) * 4
    with torch.cuda.device_of(sae.W_enc):
        scale = None
        if gradient_clip:
            squares = [_square_norm(w, g, is_unit) for w, g, _, is_unit in parts]
            scale = (gradient_clip / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)
        for (weight, gradient, (mean, square), is_unit), copy in zip(parts, copies, strict=True):
            n, D = weight.numel(), weight.shape[1] if weight.dim() == 2 else 1024
            run(
                adam_rows, (-(-n // D),),
                weight, gradient, mean, square, weight if copy is None else copy,
                weight if scale is None else scale, rates, grad.valid, n, D, 1 - beta1, beta2,
                1 - beta2, ADAM_EPSILON,
                UNIT=is_unit, SCALED=scale is not None, HALF=copy is not None, **of_rows(D, 256),
            )  # fmt: skip
    say_changed(sae, half)


def say_changed(sae: SAE, half: HalfWeights | None) -> None:
    """What Triton's kernel has written to, and torch has not noticed; `half` is up to date."""
    for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
        torch.autograd.graph.increment_version(parameter)
    if half is not None:
        half.versions = _versions(sae)


def _square_norm(weight: Tensor, gradient: Tensor, unit: bool) -> Tensor:
    """The square of the norm of what Adam will see: 0-d."""
    from saeray.sae.gpu.gradient_kernels import square_norms

    if gradient.dim() == 1:
        return gradient.square().sum()
    out, D = gradient.new_empty(len(gradient)), gradient.shape[1]
    run(square_norms, (len(gradient),), gradient, weight, out, D, UNIT=unit, **of_rows(D, 256))
    return out.sum()
