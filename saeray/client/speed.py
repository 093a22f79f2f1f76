"""How fast a sweep is and what limits it, in words, from what its parts say of themselves."""

from __future__ import annotations

from typing import NamedTuple

from saeray.spec.messages import Gauges, SweepStatus

WAITS = 0.1  # of the trainers' time: with more waiting for activations, these are the limit
AROUND = 0.2  # the same, for what they do around the step
EARLY = 2.0  # seconds, in which the first steps load this and that
BUSY = 0.5  # of the harvesters' time: with less, it is not the language model that is waited for


def human(n: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def duration(seconds: float) -> str:
    seconds = int(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def bottleneck(status: SweepStatus) -> str:
    """What limits the training, and by which figures; before it begins, what is waited for."""
    limit = limit_of(status)
    return status.phase if limit is None else f"limit: {limit}"


def limit_of(status: SweepStatus, after: float = EARLY) -> str | None:
    """What limits the training; None in the first `after` seconds of the trainers' time."""
    waited = sum(r.waited_seconds for r in status.readers.values())
    busy = sum(r.busy_seconds for r in status.readers.values())
    stepped = sum(r.step_seconds for r in status.readers.values())
    if waited + busy <= after:
        return None
    waits, around = waited / (waited + busy), max(0.0, busy - stepped) / (waited + busy)
    harvesting = max((harvesters_busy(g) for g in status.gauges), default=0.0)
    if waits > max(WAITS, around):
        of_trainers = f"trainers wait for activations {waits:.0%} of the time"
        if harvesting >= BUSY:
            return f"the language model ({of_trainers})"
        who = "the text, or a pack that is slower than others"
        return f"{who} ({of_trainers}, harvesters are idle {1 - harvesting:.0%})"
    if around > AROUND:
        return f"what is around the SAEs' step ({around:.0%} of the trainers' time)"
    step = stepped / (waited + busy)
    return f"the SAEs' step ({step:.0%} of the time; harvesters idle {1 - harvesting:.0%})"


def harvesters_busy(gauges: Gauges) -> float:
    """Share of their time that a stream's harvesters compute."""
    elapsed = gauges.elapsed_seconds * gauges.n_harvesters
    return min(1.0, gauges.harvest_seconds / elapsed) if elapsed > 0 else 0.0


class Times(NamedTuple):
    """Of one session of a sweep; time.time() where its driver runs."""

    began: float
    ended: float
    trained_before: int = 0  # SAE-tokens, in earlier sessions


def account(status: SweepStatus, times: Times) -> list[str]:
    """Lines on a sweep that is over: wall time, start-up, speed, and what limited it."""
    if status.training_since is None or status.training_until is None:
        return []
    wall = times.ended - times.began
    start_up = status.training_since - times.began
    training = status.training_until - status.training_since
    rest = wall - start_up - training
    saes = status.trained_tokens - times.trained_before
    words = f"{duration(wall)} in all: {start_up:.1f} s to the first step, "
    if training <= 0 or saes <= 0:
        return [f"{words}the rest for evaluation and the end."]
    one = sum(status.pass_tokens) * saes / max(1, status.trained_tokens)
    lines = [
        f"{words}{training:.1f} s of training at {human(saes / training)} SAE-tokens/s "
        f"({human(one / training)} tokens/s), {rest:.1f} s for evaluation and the end."
    ]
    limit = limit_of(status, 0.0) or status.phase
    if start_up > training:
        limit = f"start-up, which was longer than the training; then {limit}"
    return [*lines, f"limit: {limit}"]
