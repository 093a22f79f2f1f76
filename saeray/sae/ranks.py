"""Ranks: several processes that train the same SAEs together, each on its share of every batch.

All ranks see the whole batch (it is small beside what is computed from it), so what is a statistic
of the batch needs no exchange; each computes the gradient of its own lanes, and the gradients are
summed. Every rank then makes the same optimizer step and holds the same weights. The result equals
that of one rank but for the order in which lanes are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor


class Ranks:
    """This process's place among them. Alone, nothing is exchanged."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """size > 1 needs an initialised default process group (gloo or nccl)."""
        self.rank = rank
        self.size = size

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def own(self, lanes: Sequence[Any]) -> Sequence[Any]:
        """This rank's share of the lanes: contiguous, and together all of them."""
        n = len(lanes)
        return lanes[self.rank * n // self.size : (self.rank + 1) * n // self.size]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the ranks, the same bits on all of them."""
        if self.size > 1:
            for t in tensors:
                torch.distributed.all_reduce(t)

    def joined(self, values: Tensor) -> Tensor:
        """The vectors of all ranks one after another, on all of them; they may differ in length."""
        if self.size == 1:
            return values
        lengths = torch.zeros(self.size, dtype=torch.int64, device=values.device)
        lengths[self.rank] = len(values)
        self.sum_((lengths,))
        each = values.new_zeros(self.size, int(lengths.max()))
        each[self.rank, : len(values)] = values
        self.sum_((each,))
        return torch.cat([row[:n] for row, n in zip(each, lengths.tolist(), strict=True)])

    def gathered(self, value: Any) -> list[Any]:
        """What each rank has for `value`, on all ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def first_says(self, value: Any) -> Any:
        """What the first rank has for `value`, on all ranks."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
