"""The notice that a node is about to be taken away: a spot machine's, or an autoscaler's.

A pack then saves its SAEs at its next log step and ends its workers, which Ray Train starts again
on nodes that stay. Harvesters there are moved by the buffer: `stream.harvester_pool`.
"""

from __future__ import annotations

from ray import train


class NodeTakenAway(RuntimeError):
    """Why a pack's workers have ended."""


def node_is_taken_away() -> bool:
    """Whether a node of this pack's workers is about to be.

    As Ray Train's watcher says, where there is one: `launcher.fit_pack`.
    """
    told = getattr(train, "get_preemption_info", None)  # older Rays have none
    return told is not None and told() is not None
