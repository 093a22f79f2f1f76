"""What a sweep has cost and what limited it, for its page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from saeray.files.account import Session
from saeray.report.gather import SweepData
from saeray.spec.messages import rows_are


class Part(NamedTuple):
    """A part of the time, for a bar."""

    name: str
    seconds: float
    share: float  # of the whole, 0 to 1


class Costs(NamedTuple):
    """Of one sweep, all its sessions together. None: nothing has told it."""

    rows_are: str  # what is harvested
    harvested_tokens: int | None
    cached_tokens: int | None
    one_pass_tokens: int  # of one SAE
    trained_tokens: int  # SAE-tokens, all SAEs together
    evaluation_tokens: int
    wall_s: float | None
    began: str | None
    sae_tokens_per_s: float | None
    parts: list[Part]  # of the wall time
    trainers: list[Part]  # of the time of packs
    harvesters: list[Part]
    limits: list[str]  # a line per session
    placement: str
    warnings: list[str]
    n_sessions: int

    @property
    def passes(self) -> float | None:
        """Harvested tokens per token of one SAE."""
        if not self.one_pass_tokens or self.harvested_tokens is None:
            return None
        return self.harvested_tokens / self.one_pass_tokens


def costs_of(sweep: SweepData) -> Costs:
    """From its sessions' account, and without one from its SAEs' logs."""
    newest = [log.newest for log in sweep.logs.values()]
    tokens = [int(of.get("details/n_training_tokens") or 0) for of in newest]
    sessions = sweep.sessions
    training = sum(s.training_s or 0.0 for s in sessions)
    trained = sum(s.trained_tokens for s in sessions)
    wall = sum(s.ended - s.began for s in sessions)
    return Costs(
        rows_are=rows_are(c.model_name for c in sweep.configs.values()),
        harvested_tokens=sum(s.harvested_tokens for s in sessions) if sessions else None,
        cached_tokens=sum(s.cached_tokens for s in sessions) if sessions else None,
        one_pass_tokens=sum(s.one_pass_tokens for s in sessions) or max(tokens, default=0),
        trained_tokens=sum(tokens),
        evaluation_tokens=max((s.evaluation_tokens for s in sessions), default=0),
        wall_s=wall if sessions else None,
        began=time.strftime("%Y-%m-%d %H:%M", time.localtime(sessions[0].began))
        if sessions
        else None,
        sae_tokens_per_s=trained / training if training > 0 else None,
        parts=parts_of(
            {
                "start-up, to the first step": sum(s.start_up_s or 0.0 for s in sessions),
                "training": training,
                "evaluation and the end": sum(s.rest_s or 0.0 for s in sessions),
            }
        ),
        trainers=summed(sessions, "trainers_s"),
        harvesters=summed(sessions, "harvesters_s"),
        limits=[s.limit for s in sessions if s.limit],
        placement=sessions[-1].placement if sessions else "",
        warnings=list(dict.fromkeys(w for s in sessions for w in s.warnings)),
        n_sessions=len(sessions),
    )


def summed(sessions: Sequence[Session], field: str) -> list[Part]:
    seconds: dict[str, float] = {}
    for session in sessions:
        of: Any = getattr(session, field) or {}
        for name, value in of.items():
            seconds[name] = seconds.get(name, 0.0) + value
    return parts_of(seconds)


def parts_of(seconds: dict[str, float]) -> list[Part]:
    """Those that took any time."""
    whole = sum(seconds.values())
    return [Part(name, s, s / whole) for name, s in seconds.items() if s > 0]
