"""The `scheduler:` section of a config: which SAEs are stopped early, and on what objective.

    scheduler: {name: asha, metric: CE_loss_score, grace_period: 2_000_000, reduction_factor: 2}

Ray Tune's schedulers do the stopping (`saeray.cluster.stopping`). Plain data, without Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from saeray.errors import ConfigError, bad_value, nearest
from saeray.spec.checks import check_types

ASHA, MEDIAN = "asha", "median"
SCHEDULERS = (ASHA, MEDIAN)
GRACE = 0.1  # of the training, where grace_period is not given


class Objective(NamedTuple):
    """What SAEs may be stopped on."""

    mode: str | None  # max or min where one of them is better; None: has to be given
    evaluated: bool  # on held-out text, so only every `eval_every` steps


OBJECTIVES = {
    "eval/CE_loss_score": Objective("max", True),
    "eval/ce_loss_with_sae": Objective("min", True),
    "eval/kl_div_with_sae": Objective("min", True),
    "metrics/explained_variance": Objective("max", False),
    "metrics/l0": Objective(None, False),
    "losses/overall_loss": Objective("min", False),
    "losses/mse_loss": Objective("min", False),
}
EVALUATED = tuple(key for key, of in OBJECTIVES.items() if of.evaluated)

# Names of Ray Tune's schedulers in which one trial goes on with another's weights.
TAKES_OVER = ("PopulationBasedTraining", "PB2", "PopulationBasedTrainingReplay")
NO_TAKEOVER = (
    "an SAE does not go on with another one's weights: what an SAE is, is a function of its own "
    "config. Stop bad ones early by ASHA, and search hyper-parameters by a searcher (Optuna)."
)


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """Stops SAEs that do worse than others at the same number of tokens."""

    name: str  # asha: the worst at each rung; median: those below the others' running median
    metric: str  # an objective's wandb key; CE_loss_score is enough
    mode: str | None = None  # max or min; None: as the objective has it
    # Training tokens before which nobody is stopped; None: a tenth, or the first evaluation.
    grace_period: int | None = None
    reduction_factor: int | float = 4  # asha: one of so many goes on from a rung to the next

    def __post_init__(self) -> None:
        check_types(self, "scheduler.")
        if self.name not in SCHEDULERS:
            raise bad_value("scheduler.name", self.name, remedy_for(self.name))
        by_name = {key.rpartition("/")[2].casefold(): key for key in OBJECTIVES}
        given = self.metric.casefold()
        if given.startswith("metrics/") and f"eval/{given[8:]}" in map(str.casefold, EVALUATED):
            given = f"eval/{given[8:]}"  # as it was called before
        key = by_name.get(given.rpartition("/")[2])
        if key is None or given not in (key.casefold(), key.rpartition("/")[2].casefold()):
            names = [k.rpartition("/")[2] for k in OBJECTIVES]
            raise bad_value(
                "scheduler.metric",
                self.metric,
                f"one of {', '.join(names)}; {nearest(self.metric, names)}",
            )
        object.__setattr__(self, "metric", key)
        mode = self.mode or OBJECTIVES[key].mode
        if mode not in ("max", "min"):
            raise bad_value("scheduler.mode", mode, f"max or min: which {self.metric} is better.")
        object.__setattr__(self, "mode", mode)
        if self.grace_period is not None and self.grace_period < 1:
            raise bad_value(
                "scheduler.grace_period", self.grace_period, "training tokens, above 0."
            )
        if self.reduction_factor <= 1:
            raise bad_value("scheduler.reduction_factor", self.reduction_factor, "above 1.")

    def grace(self, config: Any) -> int:
        """Training tokens before which nobody is stopped, of the sweep of this SAE."""
        if self.grace_period is not None:
            return self.grace_period
        first = evaluated_every(config) if OBJECTIVES[self.metric].evaluated else 1
        return max(1, first, int(longest(config) * GRACE))

    def described(self, config: Any) -> str:
        """In words, for --dry-run."""
        of = f", one of {self.reduction_factor:g} goes on" if self.name == ASHA else ""
        return (
            f"{self.name} on {self.metric} ({self.mode}), from {self.grace(config):,} tokens on{of}"
        )


def evaluated_every(config: Any) -> int:
    """Training tokens between evaluations; 0: only at the end."""
    return int(config.resolved_eval_every * config.train_batch_size)


def longest(config: Any) -> int:
    """Training tokens of the sweep's longest training."""
    return int(config.stream_tokens or config.training_tokens)


def remedy_for(name: str) -> str:
    plain = name.replace("_", "").casefold()
    if plain in ("pbt", *(n.casefold() for n in TAKES_OVER)):
        return NO_TAKEOVER
    if plain == "hyperband":
        return (
            "it pauses SAEs and wakes them later, each time for another pass of the language "
            "model; asha decides the same without."
        )
    return f"one of {', '.join(SCHEDULERS)}; {nearest(name, SCHEDULERS)}"


def scheduler_from(data: Mapping[str, Any]) -> Scheduler:
    """Reads the `scheduler:` section, refusing keys that no field has."""
    known = {f.name for f in fields(Scheduler)}
    for key in data:
        if key not in known:
            raise ConfigError(f"scheduler: unknown key {key!r}; {nearest(str(key), known)}")
    for key in ("name", "metric"):
        if key not in data:
            raise ConfigError(f"scheduler: {key} must be given.")
    return Scheduler(**data)


def check_scheduler(config: Any) -> None:
    """Whether one SAE can be stopped by its sweep's scheduler.

    Raises:
        ConfigError: nothing would be stopped, or the objective comes too late.
    """
    scheduler = config.scheduler
    if scheduler is None:
        return
    tokens, grace, every = longest(config), scheduler.grace(config), evaluated_every(config)
    if (
        scheduler.grace_period is None
        and OBJECTIVES[scheduler.metric].evaluated
        and every >= tokens
    ):
        raise bad_value(
            "eval_every",
            config.resolved_eval_every,
            f"{scheduler.metric}, which SAEs shall be stopped on, would not be known before the "
            "end; evaluate more often.",
        )
    if grace >= tokens:
        raise bad_value(
            "scheduler.grace_period",
            grace,
            f"training ends after {tokens:,} tokens, so none would be stopped; lower it.",
        )
    if OBJECTIVES[scheduler.metric].evaluated and not 0 < every <= grace:
        when = (
            f"every {every:,} tokens (eval_every)" if every else "at the end only (eval_every: 0)"
        )
        raise bad_value(
            "scheduler.metric",
            scheduler.metric,
            f"is known {when}, and decided upon from {grace:,} tokens on (grace_period); "
            "evaluate more often, or raise grace_period.",
        )


def refuse_takeover(scheduler: Any) -> None:
    """Refuses schedulers of Ray Tune in which one trial goes on with another's weights.

    Raises:
        ConfigError: by the scheduler's name.
    """
    for kind in type(scheduler).__mro__:
        if kind.__name__ in TAKES_OVER:
            raise ConfigError(f"scheduler {type(scheduler).__name__}: {NO_TAKEOVER}")
