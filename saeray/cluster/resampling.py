"""Resampling in a pack: what its SAEs ask of the harvesters in the middle of the training.

All ranks of a pack are at the same step with the same SAEs, so the first asks for all of them. The
pack waits: what is picked depends on the SAEs as they are after this step, and on nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from ray.exceptions import ObjectLostError
from torch import Tensor

from saeray.actors import waiting
from saeray.errors import Late
from saeray.sae.ranks import Ranks
from saeray.sae.resampling import batches_of
from saeray.sae.trainer import SAETrainer
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.memory import SAES_AT_HARVESTER
from saeray.spec.messages import PackPlan, RowsFor, RowsWanted


class Member(Protocol):
    """An SAE of a pack, as far as it matters here."""

    name: str
    config: LanguageModelSAERunnerConfig
    trainer: SAETrainer


def resample(
    due: Sequence[Any],
    plan: PackPlan,
    ranks: Ranks,
    limit_s: float,
    snapshot: Callable[[Any], Any],
) -> None:
    """Gives the dead features of members that are due for it, after this step, a new start.

    snapshot: makes a reference of a member's SAE as it is.
    """
    members = [m for m in due if m.trainer.wants_rows]
    for some in together(members):
        found = rows_for(some, plan, limit_s, snapshot) if ranks.is_first else None
        for m, (rows, weights) in zip(some, ranks.first_says(found), strict=True):
            m.trainer.resample(rows, weights)


def together(members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Members whose weights a harvester can have together, or one."""
    some: list[Member] = []
    taken = 0
    for m in members:
        n_bytes = sum(t.numel() * t.element_size() for t in m.trainer.sae.tensors.values())
        if some and taken + n_bytes > SAES_AT_HARVESTER:
            yield some
            some, taken = [], 0
        some.append(m)
        taken += n_bytes
    if some:
        yield some


def rows_for(
    members: Sequence[Member], plan: PackPlan, limit_s: float, snapshot: Callable[[Any], Any]
) -> list[tuple[Tensor, Tensor]]:
    """For each member rows [n, D] of its stream, and their weights [n].

    Raises:
        Late: nothing comes from the harvesters within the limit.
        SaerayError: they can't pick any; says why.
    """
    first = members[0]
    n_rows = first.trainer.step * first.config.train_batch_size
    wanted = RowsWanted(
        plan.pack,
        batches_of(n_rows, plan.order.block_rows, plan.order.n_blocks),
        tuple(rows_wanted(m) for m in members),
    )
    snapshots = [snapshot(m) for m in members]
    deadline = time.monotonic() + limit_s
    while True:
        refs = waiting.poll(
            lambda: plan.buffer.rows_for_dead.remote(wanted, snapshots),  # noqa: B023
            limit_s,
            "activation buffer",
        )
        try:
            by_block = waiting.get(refs, limit_s, "object store")
            break
        except ObjectLostError:  # with the buffer, or with a node
            if time.monotonic() > deadline:
                raise Late(
                    f"rows for dead features were lost again and again for {limit_s:g} s "
                    "(wait_limit_s)."
                ) from None
            wanted = wanted._replace(attempt=wanted.attempt + 1)
    return [joined(of_block[i] for of_block in by_block) for i in range(len(members))]


def rows_wanted(m: Member) -> RowsFor:
    return RowsFor(
        m.name,
        m.config.resolved_hook_point,
        str(m.config.feature_sampling_method),
        m.config.seed,
        m.trainer.step,
    )


def joined(picked: Iterator[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    rows, weights = zip(*picked, strict=True)
    return torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(weights))
