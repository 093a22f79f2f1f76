"""What a decoder row points at: tokens, through the unembedding, and the rows nearest to it.

L = d_sae, D = d_in, V tokens; n of each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeray.sae.metrics import row_norms

AT_ONCE = 1 << 24  # elements of a block of logits or cosines: 64 MB in float32
LOGIT_BINS = 50


class LogitEffects(NamedTuple):
    """Of W_dec U^T, [L, V]: what one unit of a feature adds to every token's logit. On the CPU."""

    top_token: Tensor  # int64 [L, n], the largest first
    top_logit: Tensor  # float32 [L, n]
    bottom_token: Tensor  # int64 [L, n], the smallest first
    bottom_logit: Tensor
    histogram: Tensor  # int64 [L, LOGIT_BINS], of equal width between …
    range: Tensor  # float32 [L, 2]: the smallest and the largest of them


def logit_effects(W_dec: Tensor, unembedding: Tensor, n: int = 10) -> LogitEffects:
    """W_dec [L, D], unembedding [V, D], both float. `AT_ONCE` of the L · V logits at a time."""
    n_tokens = len(unembedding)
    parts = []
    for rows in W_dec.split(max(1, AT_ONCE // n_tokens)):
        logits = rows.to(unembedding.dtype) @ unembedding.t()
        top, bottom = logits.topk(min(n, n_tokens)), logits.topk(min(n, n_tokens), largest=False)
        low, high = bottom.values[:, :1], top.values[:, :1]
        scaled = (logits - low) * (LOGIT_BINS / (high - low).clamp_min(1e-30))
        into = scaled.long().clamp_(0, LOGIT_BINS - 1)
        counts = torch.zeros(len(rows), LOGIT_BINS, dtype=torch.int64, device=rows.device)
        counts.scatter_add_(1, into, torch.ones_like(into))
        found = (
            top.indices, top.values, bottom.indices, bottom.values, counts,
            torch.cat([low, high], dim=1),
        )  # fmt: skip
        parts.append([t.cpu() for t in found])
    return LogitEffects(*(torch.cat(of) for of in zip(*parts, strict=True)))


class Nearest(NamedTuple):
    """The decoder rows that point most the same way, of each: [L, n], the nearest first."""

    feature: Tensor  # int64, on the CPU; -1 where there are not so many
    cosine: Tensor  # float32


def nearest_features(W_dec: Tensor, n: int = 5) -> Nearest:
    """W_dec [L, D]. L² · D multiplications; `AT_ONCE` of the L² cosines are held at a time."""
    L = len(W_dec)
    unit = W_dec / row_norms(W_dec).unsqueeze(1)
    features = torch.full((L, n), -1)
    cosines = torch.zeros(L, n)
    k = min(n, L - 1)
    for rows in torch.arange(L, device=W_dec.device).split(max(1, AT_ONCE // L)) if k else ():
        cosine = unit[rows] @ unit.t()
        cosine.scatter_(1, rows.unsqueeze(1), -2.0)  # not itself
        found = cosine.topk(k, dim=1)
        at = rows.cpu()
        features[at, :k] = found.indices.cpu()
        cosines[at, :k] = found.values.float().cpu()
    return Nearest(features, cosines)
