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


WATCHES = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"


def quieten_train() -> None:
    """Settings of Ray Train for whoever starts it, before it is imported."""
    # Without the process Train would start, for each pack, to watch for preemption: `watch_nodes`.
    os.environ.setdefault(WATCHES, "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    # A run that has ended is noticed when its controller looks: every 2 s, if not told otherwise.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


def watch_nodes() -> None:
    """Has Ray Train tell its workers of a node that is about to be taken away (its notice)."""
    os.environ[WATCHES] = "1"  # whatever `quieten_train` said in the process that started this Ray
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")  # 5, if not told otherwise
