"""How long a sweep takes, part by part, and what would make it shorter. Plain data, arithmetic.

Training is a walk of the trainers over the rows of the stream while harvesters make them, in
stretches: while most features are active a step is dense, and later it is made of few active ones
(`saeray.sae.sparse_step`), which takes less. Who is faster waits for the other, and where both run
on the same cores each is slower while the other computes. With a row taking a trainer s seconds by
itself and s' beside the harvesters, and them h by themselves and h' beside the trainers:

    h' <= s'   the step is the limit: for h' of a row's seconds both compute, which makes h'/s' of
               the step, and the rest of it takes s:       h' + s (1 - h'/s')
    else       harvesting is:                              s' + h (1 - s'/h')
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fitted import Fitted
from saeray.spec.grid import SAE
from saeray.spec.memory import evaluated_together, trials_at_once
from saeray.spec.plan import StreamPlan, cut_packs

WORTH_SAYING = 1.05  # times as fast
# Forwards of the held-out windows that no SAE changes, once for each hook point and harvester: with
# zeros and with the mean at the hook, the model as it is, and one that stops at the hook.
ABLATIONS = 4


class Stretch(NamedTuple):
    """How fast training is while it is as it is: seconds for each row or token."""

    step: float  # a trainer's, for a row of one SAE
    harvest: float  # all harvesters' together, for a token
    step_beside: float = 0.0  # while harvesters compute on the same cores; 0: as by itself
    harvest_beside: float = 0.0  # while trainers do

    @property
    def slowed(self) -> tuple[float, float]:
        """step and harvest, beside each other."""
        return self.step_beside or self.step, self.harvest_beside or self.harvest


class Speeds(NamedTuple):
    """How fast the parts are: calibrated, or as somebody said."""

    dense: Stretch
    sparse: Stretch
    dense_share: float = 0.0  # of the rows
    forward: float = 0.0  # seconds of a harvester for a token of a whole forward, with an SAE in it
    start_up: float = 0.0  # seconds to the first optimizer step, the first blocks not counted
    trials: float = 0.0  # seconds that the start of one trial takes from the training
    end: float = 0.0  # seconds after training, evaluation not counted

    def with_stretches(
        self, step: float = 1.0, harvest: float = 1.0, apart: bool = False
    ) -> Speeds:
        """With these times as long; apart: no longer on the same cores."""

        def of(s: Stretch) -> Stretch:
            slow_step, slow_harvest = (0.0, 0.0) if apart else s.slowed
            return Stretch(
                s.step * step, s.harvest * harvest, slow_step * step, slow_harvest * harvest
            )

        forward = self.forward * harvest
        return self._replace(dense=of(self.dense), sparse=of(self.sparse), forward=forward)

    def for_harvesters(self, n: float) -> Speeds:
        """With the stretches' tokens made n times as fast as by one; a forward stays one's."""
        return self.with_stretches(harvest=1 / n)._replace(forward=self.forward)


class Wave(NamedTuple):
    """Packs that run at the same time: one pass over the text."""

    rows: int  # of the stream, that its longest SAE sees
    sae_rows: int  # of all SAEs of its largest pack together
    evaluated: int  # tokens of whole forwards, while it trains
    evaluated_last: int  # the same, of its SAEs' ends
    cached: bool = False  # read from an activation cache


class Work(NamedTuple):
    """What the SAEs of one stream ask for."""

    waves: tuple[Wave, ...]
    tokens_per_row: float  # that the language model computes for each row that is served
    first_rows: int  # of the first half buffer, which is harvested before the first step
    n_saes: int
    packs: int  # at the same time
    trials: int = 0  # processes that are started for them

    @property
    def lm_tokens(self) -> int:
        """Harvested, over all passes."""
        return round(sum(w.rows for w in self.waves if not w.cached) * self.tokens_per_row)

    @property
    def evaluated(self) -> int:
        """Tokens of whole forwards."""
        return sum(w.evaluated + w.evaluated_last for w in self.waves)


class Forecast(NamedTuple):
    """Seconds of a sweep, by part."""

    start_up: float
    harvest: float  # of the first blocks, which the first step waits for
    dense: float
    sparse: float
    trials: float
    evaluation: float  # of the ends; what is evaluated meanwhile is in the training's time
    end: float
    limit: str  # of the longer stretch: STEP or HARVEST
    busy: tuple[float, float]  # shares of the training's time: step, harvest

    @property
    def training(self) -> float:
        return self.dense + self.sparse + self.trials

    @property
    def total(self) -> float:
        return self.start_up + self.harvest + self.training + self.evaluation + self.end

    def __add__(self, other: Forecast) -> Forecast:  # type: ignore[override]
        """Of two streams one after the other: start and end are there once."""
        longer = self if self.training >= other.training else other
        return Forecast(
            max(self.start_up, other.start_up),
            self.harvest + other.harvest,
            self.dense + other.dense,
            self.sparse + other.sparse,
            self.trials + other.trials,
            self.evaluation + other.evaluation,
            max(self.end, other.end),
            longer.limit,
            longer.busy,
        )


STEP, HARVEST = "the SAEs' step", "the language model"


def work_of(
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    plan: StreamPlan,
    widths: dict[str, int],
) -> Work:
    """What SAEs on one stream ask for, placed like this. widths: d_in by hook point."""
    packs = cut_packs([SAE("", c) for c in configs], fitted.saes_per_trainer)
    at_once = max(1, fitted.packs)
    waves = []
    for first in range(0, len(packs), at_once):
        members = [[sae.config for sae in pack] for pack in packs[first : first + at_once]]
        each = [c for pack in members for c in pack]
        during, last = evaluated(members, max(1, fitted.harvesters), widths)
        waves.append(
            Wave(
                rows=max(c.steps * c.train_batch_size for c in each),
                sae_rows=max(sum(c.steps * c.train_batch_size for c in pack) for pack in members),
                evaluated=during,
                evaluated_last=last,
                cached=first > 0 and configs[0].activation_cache is not None,
            )
        )
    c, order = configs[0], plan.order
    return Work(
        tuple(waves),
        c.store_batch_size * c.context_size / c.block_rows,
        min(order.group_blocks, order.n_blocks) * order.block_rows,
        len(configs),
        min(at_once, len(packs)),
        trials_at_once(configs),
    )


def evaluated(
    packs: Sequence[Sequence[LanguageModelSAERunnerConfig]],
    harvesters: int,
    widths: dict[str, int],
) -> tuple[int, int]:
    """Tokens of whole forwards by which SAEs are evaluated: while they train, and at their ends.

    SAEs that are evaluated together share the forward of the model as it is.
    """
    during, last = 0, 0
    for members in packs:
        for hooks in sorted({c.hooks_read for c in members}):
            here = [c for c in members if c.hooks_read == hooks]
            window = here[0].eval_windows * here[0].context_size
            size = evaluated_together(here, widths, harvesters)
            last += window * (len(here) + -(-len(here) // size) + ABLATIONS)
            times = Counter(evaluations(c) for c in here)
            for step_count, n in times.items():
                during += window * step_count * (n + -(-n // size))
    return during, last


def evaluations(config: LanguageModelSAERunnerConfig) -> int:
    """Of one SAE, while it trains."""
    every = config.resolved_eval_every
    return (config.steps - 1) // every if every else 0


def paced(step: float, harvest: float, step_beside: float, harvest_beside: float) -> float:
    """Seconds of a row: see the module."""
    if harvest_beside <= step_beside:
        return harvest_beside + step * (1 - harvest_beside / step_beside)
    return step_beside + harvest * (1 - step_beside / harvest_beside)


def forecast(work: Work, speeds: Speeds) -> Forecast:
    """How long it takes. Packs of a wave are taken to be on machines, or GPUs, of their own."""
    seconds = {"dense": 0.0, "sparse": 0.0}
    busy_step = busy_harvest = 0.0
    head_start = work.first_rows * work.tokens_per_row  # is harvested before, and seen to below
    for wave in work.waves:
        per_row = wave.sae_rows / wave.rows
        tokens = 0.0 if wave.cached else wave.rows * work.tokens_per_row - head_start
        for name, s, share in (
            ("dense", speeds.dense, speeds.dense_share),
            ("sparse", speeds.sparse, 1 - speeds.dense_share),
        ):
            slow_step, slow_harvest = s.slowed
            slower = slow_harvest / s.harvest if s.harvest else 1.0
            harvest = max(0.0, tokens) * s.harvest + wave.evaluated * speeds.forward
            one = (s.step * per_row, harvest / wave.rows)
            rows = share * wave.rows
            seconds[name] += rows * paced(*one, slow_step * per_row, one[1] * slower)
            busy_step += rows * one[0]
            busy_harvest += rows * one[1]
    training = sum(seconds.values()) or 1.0
    return Forecast(
        start_up=speeds.start_up,
        harvest=head_start * speeds.sparse.harvest,
        dense=seconds["dense"],
        sparse=seconds["sparse"],
        trials=speeds.trials * work.trials,
        evaluation=sum(w.evaluated_last for w in work.waves) * speeds.forward,
        end=speeds.end,
        limit=STEP if busy_step >= busy_harvest else HARVEST,
        busy=(busy_step / training, busy_harvest / training),
    )
