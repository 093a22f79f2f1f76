"""The k·B largest pre-activations of a whole batch, without ever holding them all.

Each lane keeps what lies above a bound, which a step before or a few rows suggest. Where that turns
out too high it is lowered and the lanes look again; the smallest of the k·B largest is then exact,
and the same whatever the bound was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from saeray.sae.architectures.rule import Rule
from saeray.sae.gradients import Lane
from saeray.sae.ranks import Ranks

SAMPLE_ROWS = 64


def bounds(rule: Rule, x_centred: Tensor, wanted: int) -> Iterator[float]:
    """Where to look, the last one being 0, for so many entries of x_centred [B, D].

    That is the batch of all ranks, which must come to the same bounds.
    """
    smallest = rule.smallest
    if smallest == 0:  # there was no step before
        ranked = ranked_h(rule, x_centred[:SAMPLE_ROWS]).flatten()
        in_sample = 2 * wanted * len(ranked) // (len(x_centred) * rule.sae.d_sae) + 1
        smallest = max(0.0, float(ranked.topk(min(in_sample, len(ranked))).values[-1]))
    if math.isfinite(smallest) and smallest > 0:
        yield 0.7 * smallest
        yield 0.3 * smallest
    yield 0.0


def ranked_h(rule: Rule, x_centred: Tensor) -> Tensor:
    """[rows, L]: what pre-activations are chosen by."""
    h = torch.addmm(rule.sae.b_enc, x_centred, rule.sae.W_enc)
    by = rule.selected_by()
    return h if by is None else h.mul_(by)


def choose_densely(rule: Rule, x: Tensor, lanes: Sequence[Lane], ranks: Ranks) -> None:
    """For the dense step: this rank's lanes of batch x [B, D], one [rows, L] at a time."""
    wanted = rule.n_of_batch(len(x))
    if wanted is None:
        return
    found = [x.new_empty(0)]
    for lane in lanes:
        ranked = ranked_h(rule, x[slice(*lane)] - rule.sae.b_dec).flatten()
        found.append(ranked.topk(min(wanted, len(ranked)), sorted=False).values)
    rule.choose(smallest_of(torch.cat(found), wanted, ranks)[0])


def smallest_of(values: Tensor, k: int, ranks: Ranks) -> tuple[float, int]:
    """The k-th largest of the positive values [n] of all ranks, and how many there are.

    The smallest where there are fewer than k; infinity where there are none.
    """
    positive = values[values > 0]
    largest = ranks.joined(positive.topk(min(k, len(positive))).values)
    if len(largest) == 0:
        return math.inf, 0
    return float(largest.topk(min(k, len(largest))).values[-1]), len(largest)
