"""What would make a sweep shorter, each thing with how much: the forecast, made again with it.

Plain data. What is not computed is not said.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from saeray.spec.fitted import Fitted
from saeray.spec.forecast import HARVEST, STEP, WORTH_SAYING, Forecast, Speeds, Work, forecast


class Advice(NamedTuple):
    """One thing."""

    what: str
    faster: float  # times, all of the sweep

    def __str__(self) -> str:
        return f"{self.what}: {self.faster:.3g} x faster"


def advice(
    work: Work, speeds: Speeds, fitted: Fitted, two_harvesters: float = 2.0, measured: bool = False
) -> list[Advice]:
    """What would help by 5 % and more, the best first.

    two_harvesters: how much faster two are than one. measured: on this machine; else each is taken
    to have cores, or a GPU, of its own.
    """
    now = forecast(work, speeds)
    found = []
    for what, other in candidates(now, work, speeds, fitted, two_harvesters, measured):
        faster = now.total / other.total if other.total else 1.0
        if faster >= WORTH_SAYING:
            found.append(Advice(what, faster))
    return sorted(found, key=lambda a: -a.faster)


def candidates(
    now: Forecast,
    work: Work,
    speeds: Speeds,
    fitted: Fitted,
    two_harvesters: float,
    measured: bool,
) -> Iterator[tuple[str, Forecast]]:
    one = "GPU" if fitted.trainer_gpus else "node"
    if now.limit == HARVEST and fitted.harvesters:
        n = 2 * fitted.harvesters
        where = "on this machine" if measured else f"each on a {one} or on cores of its own"
        yield (
            f"{n} harvesters ({where})",
            forecast(work, speeds.with_stretches(harvest=1 / two_harvesters)),
        )
        if measured:
            yield (
                f"{n} harvesters, one more {one} like this for half of them",
                forecast(work, speeds.with_stretches(harvest=0.5)),
            )
    if now.limit == STEP and work.n_saes > 1:
        half = [w._replace(sae_rows=-(-w.sae_rows // 2)) for w in work.waves]
        yield (
            f"trainers on twice as many {one}s like this",
            forecast(work._replace(waves=tuple(half)), speeds),
        )
    if fitted.harvesters:
        yield (
            f"harvesters on another {one} than the trainers",
            forecast(work, speeds.with_stretches(apart=True)),
        )
    if len(work.waves) > 1:
        if not any(w.cached for w in work.waves):
            kept = [w._replace(cached=i > 0) for i, w in enumerate(work.waves)]
            yield (
                "activation_cache, for the second pass on",
                forecast(work._replace(waves=tuple(kept)), speeds),
            )
        merged = work.waves[0]._replace(
            rows=max(w.rows for w in work.waves),
            sae_rows=max(w.sae_rows for w in work.waves),
            evaluated=sum(w.evaluated for w in work.waves),
            evaluated_last=sum(w.evaluated_last for w in work.waves),
        )
        by = fitted.one_pass_by or f"as many {one}s as there are packs"
        yield f"one pass over the text ({by})", forecast(work._replace(waves=(merged,)), speeds)
    if any(w.evaluated for w in work.waves):
        without = [w._replace(evaluated=0) for w in work.waves]
        yield (
            "eval_every: 0 (at the end only)",
            forecast(work._replace(waves=tuple(without)), speeds),
        )
