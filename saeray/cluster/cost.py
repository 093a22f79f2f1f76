"""What a session of a sweep has cost and what limited it, from what its parts say of themselves.

At a session's end that is written down in the sweep's folder, and with it the page to look at.
"""

from __future__ import annotations

from typing import NamedTuple

from saeray.errors import SaerayError
from saeray.files.account import Session, add_session
from saeray.files.storage import Folder
from saeray.spec.messages import KNOWN_ROWS, Gauges, SweepStatus

WAITS = 0.1  # of the trainers' time: with more waiting for activations, these are the limit
AROUND = 0.2  # the same, for what they do around the step
EARLY = 2.0  # seconds, in which the first steps load this and that
BUSY = 0.5  # of the harvesters' time: with less, it is not the language model that is waited for


class Times(NamedTuple):
    """Of one session of a sweep; time.time() where its driver runs."""

    began: float
    ended: float
    trained_before: int = 0  # SAE-tokens, in earlier sessions


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
            made = status.rows_are == KNOWN_ROWS
            return f"{'what makes the rows' if made else 'the language model'} ({of_trainers})"
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


def session_of(status: SweepStatus, times: Times) -> Session:
    """The same as figures, for the sweep's folder."""
    since, until = status.training_since, status.training_until
    saes = status.trained_tokens - times.trained_before
    share = saes / status.trained_tokens if status.trained_tokens else 0.0
    readers = status.readers.values()
    stepped = sum(r.step_seconds for r in readers)
    busy = sum(g.harvest_seconds for g in status.gauges)
    elapsed = sum(g.elapsed_seconds * g.n_harvesters for g in status.gauges)
    return Session(
        began=times.began,
        ended=times.ended,
        start_up_s=None if since is None else since - times.began,
        training_s=None if since is None or until is None else until - since,
        trainers_s={
            "the SAEs' step": stepped,
            "around the step": max(0.0, sum(r.busy_seconds for r in readers) - stepped),
            "waiting for activations": sum(r.waited_seconds for r in readers),
        },
        harvesters_s={"the language model": busy, "idle": max(0.0, elapsed - busy)},
        harvested_tokens=status.harvested_tokens,
        cached_tokens=status.cached_tokens,
        trained_tokens=saes,
        one_pass_tokens=round(sum(status.pass_tokens) * share),
        evaluation_tokens=status.evaluation_tokens,
        packs=len(status.packs),
        limit=limit_of(status, 0.0),
        placement=status.placement,
        warnings=list(status.warnings),
    )


def write_down(folder: Folder, status: SweepStatus, times: Times) -> str | None:
    """A session's account and the sweep's page, at its end; a warning if something prevents them.

    The SAEs are there, and a picture of them is no reason to say that their sweep has failed.
    """
    from saeray.report.report import FILE, write_report

    try:
        add_session(folder, session_of(status, times))
        write_report([folder], folder)
    except Exception as error:
        said = str(error) if isinstance(error, SaerayError) else repr(error)
        return f"no {FILE}: {said}; `saeray report {folder.uri}` makes one once that is mended."
    return None
