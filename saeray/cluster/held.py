"""A bare `tune.run`: an SAE that Ray Tune stops ends where Tune has seen it.

Tune decides on a result after the fact, while its SAE trains on. So a pack keeps a copy of each SAE
as it was at its last report, and reports no further one before Tune has decided on that: it has a
log step's time for it. What Tune sees of an SAE is then every line of its log, one after the other,
and what it stops is a function of its criterion, not of how fast anything was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from saeray.actors import waiting
from saeray.files.checkpoint import Taken, taken
from saeray.sae.trainer import SAETrainer
from saeray.spec.memory import COPIED
from saeray.spec.messages import Answer, Report

LEFT_FREE = 0.25  # of a GPU's memory, beside copies on it
DECISION_SECONDS = 30.0  # that a pack waits for Tune; an SAE whose trial is slower runs ahead of it


class Held(NamedTuple):
    """An SAE as it was at its last report."""

    report: Report
    state: Taken


def held_state(trainer: SAETrainer) -> Taken:
    """A copy of it: on its GPU while much is free there, since one comes every few steps."""
    device = trainer.sae.W_dec.device
    if device.type != "cuda":
        return taken(trainer)
    free, total = torch.cuda.mem_get_info(device)
    n_bytes = sum(t.nbytes for t in trainer.sae.tensors.values()) * COPIED
    return taken(trainer, in_place=free - n_bytes > total * LEFT_FREE)


class Decisions:
    """What a pack knows of Tune's."""

    def __init__(self, roster: Any, pack: str, limit_s: float, warn: Callable[[str], None]) -> None:
        self.roster, self.pack = roster, pack
        self.limit_s, self.warn = limit_s, warn
        self.held: set[str] = set()  # SAEs that have such trials
        self.undecided: set[str] = set()
        self.slow: set[str] = set()  # that are not waited for any more

    def take(self, answer: Answer) -> None:
        self.held = {*answer.held} - self.slow
        self.undecided = {*answer.undecided} - self.slow

    def wait(self, take: Callable[[Answer], None]) -> None:
        """Until Tune has decided on all that was reported. take: is given the roster's answers."""
        deadline = time.monotonic() + DECISION_SECONDS
        while self.undecided:
            if time.monotonic() > deadline:
                self.give_up()
                return
            take(waiting.ask(lambda: self.roster.decided.remote(self.pack), self.limit_s, "roster"))

    def give_up(self) -> None:
        for name in sorted(self.undecided):
            self.warn(
                f"{name}: Ray Tune has not decided on its last result within "
                f"{DECISION_SECONDS:g} s; it trains on, and may end later than where Tune stops it."
            )
        self.slow |= self.undecided
        self.held -= self.slow
        self.undecided = set()
