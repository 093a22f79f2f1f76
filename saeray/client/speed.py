"""How fast a sweep is and what limits it, in words, from what its parts say of themselves."""

from __future__ import annotations

from saeray.cluster.cost import Times, limit_of
from saeray.spec.messages import SweepStatus


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
