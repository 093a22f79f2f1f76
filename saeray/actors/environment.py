"""What Ray's processes inherit of the environment of those that start them. Imports no Ray."""

from __future__ import annotations

import os

# Set for the Ray that a sweep starts on its machine for itself: `client.own_ray`.
OWN_RAY = "SAERAY_OWN_RAY"
# The Ray that `client.own_ray` and `cluster.lean_trainer` know from the inside.
TRIED_WITH = "2.60."


def in_own_ray() -> bool:
    """Whether the Ray that has started this process is a sweep's own: one node, no dashboard."""
    return OWN_RAY in os.environ


def quieten_train() -> None:
    """Settings of Ray Train for whoever starts it, before it is imported."""
    # Without the process that Train would start, for each pack, to watch for nodes that are taken
    # away: `cluster.preemption` looks itself.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # A run that has ended is noticed when its controller looks: every 2 s, if not told otherwise.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
