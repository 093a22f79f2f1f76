"""What an SAE starts from: figures of a sample of activations."""

from __future__ import annotations

import torch
from torch import Tensor


def statistic_of(rows: Tensor, name: str) -> Tensor:
    """Of activations rows [n, D]: "mean_norm" [1] in float32, or `initial_b_dec` by its method."""
    if name == "mean_norm":
        return torch.linalg.vector_norm(rows.double(), dim=1).mean().float().reshape(1)
    return initial_b_dec(rows, name)


def initial_b_dec(rows: Tensor, method: str) -> Tensor:
    """A point in the middle of activations rows [n, D]: [D] in float32.

    "geometric_median" (package geom_median, Weiszfeld), "mean" or "zeros". geom_median turns the
    tensor into a Python list and visits every point in every iteration, so callers pass it a
    bounded sample and do it once for a whole sweep.
    """
    rows = rows.float()
    if method == "zeros":
        return torch.zeros(rows.shape[1])
    if method == "mean":
        return rows.mean(dim=0)
    if method == "geometric_median":
        from geom_median.torch import compute_geometric_median

        # The objective settles to 6 digits in some ten iterations; its default tolerance (1e-20)
        # would always run all 100.
        return compute_geometric_median(rows, maxiter=100, ftol=1e-6).median.contiguous()
    raise ValueError(f"b_dec_init_method {method!r}: geometric_median, mean or zeros")
