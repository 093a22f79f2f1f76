"""The losses as plain functions of tensors: what the closed-form gradients must agree with.

`saeray.sae.gradients` computes values and gradients of exactly these without autograd; the tests
hold the two together.  B rows, D = d_in, L = d_sae.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-6
MSE_NORMALIZATIONS = ("centred_norm", "none", "sum")


def mse_normaliser(x: Tensor, normalization: str) -> Tensor:
    """What each row's squared error is divided by: [B, 1].

    "centred_norm": the norm (not its square) of the row after subtracting the batch mean, + 1e-6.
    "none", "sum": 1. Depends on the batch alone, so all SAEs of a pack share it.
    """
    if normalization in ("none", "sum"):
        return torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
    if normalization == "centred_norm":
        centred = x - x.mean(dim=0, keepdim=True)
        return torch.linalg.vector_norm(centred, dim=1, keepdim=True) + EPSILON
    raise ValueError(f"mse_normalization {normalization!r}: one of {MSE_NORMALIZATIONS}")


def mse_weight(d_in: int, normalization: str) -> int:
    """The mean over B and D is multiplied by this: "sum" is the mean over B of the sum over D."""
    return d_in if normalization == "sum" else 1


class Losses(NamedTuple):
    """Scalars (0-d tensors)."""

    mse: Tensor  # mean over B and D of (x̂ - x)² / normaliser, times `mse_weight`
    l1: Tensor  # mean over B of the (weighted) sum over features, without the coefficient
    ghost: Tensor
    overall: Tensor  # mse + l1_coefficient * l1 + ghost


def sae_losses(
    x: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    *,
    l1_coefficient: float,
    normalization: str = "centred_norm",
    weighted_l1: bool = False,
    dead: Tensor | None = None,
) -> Losses:
    """The training loss of one batch x [B, D], differentiable in the four parameters.

    weighted_l1: each feature counts with the norm of its decoder row, which is free then: scaling
    f down and the row up would lower the penalty for nothing. `dead` [L] is a boolean mask; where
    any is set, the ghost gradient term is added.
    """
    h = (x - b_dec) @ W_enc + b_enc  # [B, L]
    f = torch.relu(h)
    error = f @ W_dec + b_dec - x  # [B, D]
    mse_e = error.pow(2) / mse_normaliser(x, normalization)
    mse = mse_e.mean() * mse_weight(x.shape[1], normalization)
    weight = torch.linalg.vector_norm(W_dec, dim=1) if weighted_l1 else 1.0
    l1 = (f * weight).sum(dim=1).mean()
    ghost = torch.zeros_like(mse)
    if dead is not None and bool(dead.any()):
        ghost = ghost_loss(-error, h[:, dead], W_dec[dead], mse_e, normalization)
    return Losses(mse, l1, ghost, mse + l1_coefficient * l1 + ghost)


def ghost_loss(
    residual: Tensor, h_dead: Tensor, W_dead: Tensor, mse_e: Tensor, normalization: str
) -> Tensor:
    """Ghost gradients: dead features, through exp instead of relu, predict the residual.

    residual r = x - x̂ [B, D], h_dead [B, dead], W_dead [dead, D], mse_e [B, D]. The prediction is
    scaled per row to half the residual's norm and the loss scaled elementwise to mse_e's value;
    both scales are constants to the gradient. A row with h_dead above 0 is divided by its largest
    exp, so that none overflows: the scale to half the residual's norm cancels it exactly.
    """
    residual = residual.detach()
    highest = h_dead.detach().amax(dim=1, keepdim=True).clamp_min(0)
    ghost = torch.exp(h_dead - highest) @ W_dead
    norm = torch.linalg.vector_norm(residual, dim=1, keepdim=True)
    ghost_norm = torch.linalg.vector_norm(ghost, dim=1, keepdim=True)
    ghost = ghost * (norm / (EPSILON * torch.exp(-highest) + 2 * ghost_norm)).detach()
    gm = (ghost - residual).pow(2) / mse_normaliser(residual, normalization)
    mean = ((mse_e / (gm + EPSILON)).detach() * gm).mean()
    return mean * mse_weight(residual.shape[1], normalization)
