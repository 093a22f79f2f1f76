"""Watching a sweep that runs elsewhere: drawn until it has ended; Ctrl-C asks what to do.

Whoever runs it, an actor (`driver`) or a job (`jobs`), is three calls here: look, outcome, stop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError

from saeray.actors.waiting import NotYet
from saeray.client.live import LiveView
from saeray.client.speed import Times
from saeray.spec.messages import SweepStatus


@dataclass
class Outcome:
    """How a driven sweep ended."""

    rows: list[dict[str, Any]]
    status: SweepStatus
    error: str | None = None
    bad_input: bool = False
    times: Times | None = None


class LeftRunning(KeyboardInterrupt):
    """The user has gone; the sweep goes on."""


class Stopped(KeyboardInterrupt):
    """The user has ended the sweep; what was trained is saved."""


def watch(
    look: Callable[[], SweepStatus],
    outcome: Callable[[], Any],
    stop: Callable[[], None],
    name: str,
    live: bool,
) -> Outcome:
    """Draws a sweep that runs elsewhere until it has ended. Ctrl-C asks what to do.

    Raises:
        LeftRunning: the user goes, the sweep does not.
        Stopped: the sweep was stopped; what was trained is saved.
    """

    def looked() -> SweepStatus:
        try:
            return look()
        except RayActorError as error:
            raise RuntimeError(str(error)) from None  # the next look will tell

    stopping = False
    while True:
        try:
            with LiveView(looked, live):
                ended: Any = NotYet("")
                while isinstance(ended, NotYet):
                    ended = outcome()
            if stopping:
                raise Stopped
            assert isinstance(ended, Outcome)
            return ended
        except KeyboardInterrupt:
            if stopping:  # Stopped, too
                raise
            if wants_to_leave(name):
                raise LeftRunning(name) from None
            stopping = True
            print("saeray: stopping; what is trained so far is being saved …", file=sys.stderr)
            stop()


def wants_to_leave(name: str) -> bool:
    """Asks whether to leave a sweep running; one who can't be asked wants to stop it."""
    if not sys.stdin.isatty():
        return False
    try:
        print(
            f"\n{name} runs on the cluster. [l]eave it running, or [s]top it? ", end="", flush=True
        )
        return input().strip().lower().startswith("l")
    except (EOFError, KeyboardInterrupt):
        return False
