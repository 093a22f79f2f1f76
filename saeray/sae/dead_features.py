"""What the terms of the loss for dead features (`ghost`, `auxk`, `pre_act`) have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from saeray.sae.gradients import Batch, Gradients, Lane, RunLanes, lanes_of
from saeray.sae.ranks import Ranks


class OfDead(NamedTuple):
    """Gradient and value of a term, of one lane; rows are the dead features, [n]."""

    W_enc: Tensor  # [n, D]
    W_dec: Tensor  # [n, O]
    b_enc: Tensor  # [n], Σ dh
    value: Tensor  # 0-d
    extra: dict[str, Tensor] = {}  # noqa: RUF012 - [n] of `Gradients.extra`; never written to


def add_of_dead(
    grad: Gradients,
    dead: Tensor,
    batch: Batch,
    of_lane: Callable[[Lane], OfDead],
    run_lanes: RunLanes,
    ranks: Ranks,
) -> Tensor:
    """Adds a term's gradient for the dead (indices, [n]), lanes in their order; its value, 0-d."""
    lanes = ranks.own(lanes_of(len(batch.x), batch.x.device, ranks.size))
    n, d_in, d_out = len(dead), batch.x.shape[1], batch.y.shape[1]
    new = batch.x.new_zeros
    total = OfDead(new(n, d_in), new(n, d_out), new(n), new(()), {k: new(n) for k in grad.extra})
    for i, part in enumerate(run_lanes(of_lane, lanes)):
        for mine, theirs in zip(total[:4], part[:4], strict=True):
            mine.copy_(theirs) if i == 0 else mine.add_(theirs)
        for name, theirs in part.extra.items():
            total.extra[name].add_(theirs)
    ranks.sum_((*total[:4], *total.extra.values()))
    grad.W_enc.t().index_add_(0, dead, total.W_enc)
    grad.W_dec.index_add_(0, dead, total.W_dec)
    grad.b_enc.index_add_(0, dead, total.b_enc)
    for name, values in total.extra.items():
        grad.extra[name].index_add_(0, dead, values)
    return total.value
