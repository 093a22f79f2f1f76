"""What a sweep would take, in words and figures, and where its times are told from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from saeray.errors import bad_value
from saeray.spec.advice import Advice
from saeray.spec.forecast import HARVEST, Forecast, Work

CALIBRATION_SECONDS = 20.0


class Figures(NamedTuple):
    """Where the time is told from."""

    calibrate: bool = True
    tokens_per_s: float | None = None  # of the language model, of one harvester
    sae_tokens_per_s: float | None = None  # of a pack's SAEs together
    seconds: float = CALIBRATION_SECONDS

    def checked(self) -> Figures:
        """Raises: ConfigError: a speed of nothing."""
        for name in ("tokens_per_s", "sae_tokens_per_s", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise bad_value(f"--{name.replace('_', '-')}", value, "above 0.")
        return self


@dataclass
class Plan:
    """What a sweep would take. `str()` is what `saeray plan` prints.

    seconds is None where nothing says how fast the parts are.
    """

    n_saes: int
    head: str  # the SAEs and their steps
    lines: list[str] = field(default_factory=list)  # what follows from models, texts and nodes
    warnings: list[str] = field(default_factory=list)
    memory_bytes: int = 0  # of all processes, at most, the object store's share included
    object_store_bytes: int = 0
    lm_tokens: int = 0  # harvested
    evaluation_tokens: int = 0  # of whole forwards
    passes: int = 1  # over the text
    forecast: Forecast | None = None
    harvest: str = HARVEST  # what makes activations
    advice: list[Advice] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """Of the whole command."""
        return None if self.forecast is None else self.forecast.total

    @property
    def limit(self) -> str | None:
        """What limits the training."""
        return None if self.forecast is None else self.forecast.limit

    def take(self, work: Work, found: Forecast | None) -> None:
        """One more stream, which comes after those before it."""
        first = self.lm_tokens == 0
        self.lm_tokens += work.lm_tokens
        self.evaluation_tokens += work.evaluated
        self.passes = max(self.passes, len(work.waves))
        if found is None or (self.forecast is None and not first):
            self.forecast = None
        else:
            self.forecast = found if self.forecast is None else self.forecast + found

    def __str__(self) -> str:
        lines = [self.head, *self.lines]
        if self.forecast is not None:
            lines += [f"  {text}" for text in time_said(self.forecast, self.harvest)]
            lines += [f"  would help: {one}" for one in self.advice]
        return "\n".join([*lines, *(f"! {text}" for text in self.warnings)])

    def __repr__(self) -> str:
        from saeray.client.speed import duration
        from saeray.spec.memory import size

        time = "time not known" if self.seconds is None else f"about {duration(self.seconds)}"
        limit = "" if self.limit is None else f", limit: {self.limit}"
        return (
            f"<Plan: {self.n_saes} SAEs, {time}, {size(self.memory_bytes)} of memory, "
            f"{self.lm_tokens:,} LM tokens{limit}>"
        )


def time_said(found: Forecast, makes: str) -> list[str]:
    """The time by part. makes: what makes activations."""
    from saeray.client.speed import duration

    def s(seconds: float) -> str:
        return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)

    step, harvest = found.busy
    limit = makes if found.limit == HARVEST else found.limit
    if found.start_up > found.training:
        limit = f"start-up, which is longer than the training; then {limit}"
    parts = [
        f"start-up {s(found.start_up)}",
        f"the first blocks {s(found.harvest)}",
        f"dense steps {s(found.dense)}",
        f"sparse steps {s(found.sparse)}",
        f"trials' processes {s(found.trials)}",
        f"evaluation at the end {s(found.evaluation)}",
        f"the end {s(found.end)}",
    ]
    return [
        f"time: about {s(found.total)}: {', '.join(parts)}",
        f"limit: {limit} (of the training's time, by themselves: the step {step:.0%}, "
        f"{makes} {harvest:.0%})",
    ]
