"""What shall happen to a sweep's processes, at random or cell by cell; and what did, as a table."""

from __future__ import annotations

import random
import re
import signal
from dataclasses import dataclass

# By the beginning of the name that Ray gives their processes.
KINDS = {
    "Harvester": "ray::Harvester",
    "TokenServer": "ray::TokenServer",
    "ActivationBuffer": "ray::ActivationBuffer",
    "Roster": "ray::Roster",
    "Launcher": "ray::Launcher",
    "TrainController": "ray::TrainController",
    "RayTrainWorker": "ray::RayTrainWorker",
    "SAETrial": "ray::SAETrial",
}
DRIVER = "driver"
# Only where `--only` names them: without them no sweep goes on, but by `--resume`.
RAYS = {"Gcs": "gcs_server", "Raylet": "raylet"}
SIGNALS = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM, "STOP": signal.SIGSTOP}
# Of a sweep, by what of it is there: its harvesters; its buffer; log lines; a checkpoint; a trained
# SAE; a row that has ended.
PHASES = ("start", "loading", "window", "training", "saved", "end", "closing")


@dataclass(frozen=True)
class Blow:
    """A signal to a process of one kind, so many seconds after the sweep's start, or in a phase."""

    at: float | str
    kind: str
    signal: str
    again: bool = False  # to its successor too, as soon as there is one

    @classmethod
    def read(cls, text: str) -> Blow:
        kind, _, rest = text.strip().partition(":")
        name, _, at = rest.partition("@")
        moment = at.rstrip("+")
        when = moment if moment in PHASES else float(moment)
        return cls(when, kind, name, at.endswith("+"))

    def is_due(self, seconds: float, phase: str) -> bool:
        if isinstance(self.at, str):
            return PHASES.index(phase) >= PHASES.index(self.at)
        return seconds >= self.at


def blows(seed: int, kills: int, seconds: float) -> list[Blow]:
    """What shall happen in the run of a seed that would take so long undisturbed."""
    chance = random.Random(seed)
    found: list[Blow] = []
    while len(found) < kills:
        at = chance.uniform(0.5, seconds)
        kinds = [chance.choice([*KINDS, *(["Roster"] if chance.random() < 0.2 else [])])]
        if chance.random() < 0.25:
            kinds += chance.sample(sorted(KINDS), chance.choice([1, 2]))
        if chance.random() < 0.12:
            kinds = [DRIVER]
        for kind in kinds:
            how = chance.choices(["KILL", "TERM", "STOP"], [5, 4, 1])[0]
            if kind == DRIVER and how == "STOP":
                how = "KILL"
            found.append(Blow(at, kind, how, again=how != "STOP" and chance.random() < 0.15))
    return sorted(found[:kills], key=lambda b: b.at)


def cells() -> list[list[Blow]]:
    """Plans in which every kind has every signal in every phase; where there is none yet, later."""
    kinds = [DRIVER, *KINDS]
    return [
        [Blow(phase, kinds[(turn + i) % len(kinds)], name) for i, phase in enumerate(PHASES)]
        for name in SIGNALS
        for turn in range(len(kinds))
    ]


def table(lines: list[str]) -> str:
    """What the lines of runs that went well show, as docs/faults.md has it."""
    sent: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        if re.match(r"seed \d+: ok, ", line):
            for kind, name, phase in re.findall(r"(\w+):(\w+)@[\d.]+/(\w+)", line):
                sent.setdefault((kind, phase), set()).add(name)
    rows = [f"| process | {' | '.join(PHASES)} |", "|---" * (len(PHASES) + 1) + "|"]
    for kind in (DRIVER, *KINDS, *RAYS):
        names = [", ".join(n for n in SIGNALS if n in sent.get((kind, p), ())) for p in PHASES]
        shown = kind if kind == DRIVER else f"`{kind}`"
        rows.append(f"| {shown} | {' | '.join(n or '–' for n in names)} |")
    return "\n".join(rows)
