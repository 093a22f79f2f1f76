"""The notice that a node is about to be taken away: a spot machine's, or an autoscaler's.

A pack then saves its SAEs at its next log step and ends its workers, which Ray Train starts again
on nodes that stay. Harvesters there are moved by the buffer: `stream.harvester_pool`. Ray Train
could say it, too, by a process more for each pack; it asks what is asked here.
"""

from __future__ import annotations

import threading
from collections.abc import Set

from saeray.actors.environment import in_own_ray
from saeray.actors.nodes import leaving_nodes

LOOK_SECONDS = 1.0


class NodeTakenAway(RuntimeError):
    """Why a pack's workers have ended."""


class Notice:
    """Whether one of some nodes is about to be taken away, by a thread that looks."""

    def __init__(self, nodes: Set[str]) -> None:
        """nodes: ids; none: nobody looks."""
        self.nodes = nodes
        self.closing = threading.Event()
        self.given = False
        if nodes and not in_own_ray():
            threading.Thread(target=self.look, name="preemption", daemon=True).start()

    def look(self) -> None:
        while not self.given and not self.closing.wait(LOOK_SECONDS):
            self.given = bool(self.nodes & leaving_nodes())

    def close(self) -> None:
        self.closing.set()
