"""What of Ray Tune stops SAEs early: made from a config's `scheduler:`, or refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ray.tune import Stopper, schedulers
from ray.tune.execution.tune_controller import TuneController

from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.scheduler import ASHA, longest, refuse_takeover

TIME = "n_training_tokens"  # counts on through restarts, as Tune's own iterations do not


class Over(Stopper):
    """Ends an experiment when something else says that it is over."""

    def __init__(self, over: Callable[[], bool] | None = None) -> None:
        self.over = over

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False  # a trial ends with its SAE

    def stop_all(self) -> bool:
        return self.over is not None and self.over()

    def __reduce__(self) -> tuple[Any, ...]:
        """Tune writes it down with the experiment; what it asks is this process's own."""
        return (Over, ())


def scheduler_of(config: LanguageModelSAERunnerConfig) -> Any:
    """The scheduler that a sweep's config asks for; None for none."""
    asked = config.scheduler
    if asked is None:
        return None
    objective = dict(time_attr=TIME, metric=asked.metric, mode=asked.mode)
    grace = asked.grace(config)
    if asked.name == ASHA:
        return schedulers.ASHAScheduler(
            **objective,
            grace_period=grace,
            reduction_factor=asked.reduction_factor,
            max_t=longest(config) + 1,  # never reached: an SAE's last result is its own end
        )
    return schedulers.MedianStoppingRule(**objective, grace_period=grace)


def refuse_takeover_by_the_caller() -> None:
    """The same as `refuse_takeover`, for the experiment that this call comes from.

    Tune asks a trainable class what it needs before anything of it runs, and tells it nothing of
    the scheduler: it is looked up in the calls that have led here.

    Raises:
        ConfigError: by the scheduler's name.
    """
    frame = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, TuneController):
            refuse_takeover(caller._scheduler_alg)
        frame = frame.f_back  # type: ignore[assignment]
