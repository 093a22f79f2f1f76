"""Starts a Ray of this process's own: with the processes that one machine's sweep has a use for.

`ray.init()` starts three more beside Ray's core, each of which takes a second of a core while the
language model wants to be loaded: an autoscaler (of no nodes), a monitor that sends logs to a
driver (ours wants none), and what is left of a dashboard that is switched off (a reporter of usage
statistics, which `ray.init()` switches off as well).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from saeray.actors.environment import OWN_RAY, TRIED_WITH
from saeray.errors import SaerayError

NOT_NEEDED = ("start_monitor", "start_log_monitor", "start_api_server")  # methods of Ray's Node


def runs_here() -> bool:
    """Whether a cluster runs on this machine that `ray.init()` would join."""
    from ray._private import services

    return services.canonicalize_bootstrap_address(None) is not None


def start_own_ray(**options: Any) -> None:
    """Starts Ray on this machine, for this process; options: of `ray.init()`.

    Its processes inherit this one's environment, so there is no runtime_env: a worker with one is
    started by another, which imports Ray for that alone.

    Raises:
        SaerayError: Ray did not start.
    """
    import ray

    # The history of every call, for a dashboard: there is none, and it takes 8 KB a block.
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")
    os.environ[OWN_RAY] = "1"
    try:
        with without_what_is_not_needed(), deaf_to_hang_up():
            ray.init(address="local", include_dashboard=False, **options)
    except Exception as error:  # Ray raises a bare one, 30 s after a node that has not come up
        raise SaerayError(
            f"Ray did not start on this machine: {error} It may have too much else to do, too "
            "little memory, or no room in /tmp (RAY_TMPDIR names another folder). Nothing was "
            "spent."
        ) from error
    finally:
        del os.environ[OWN_RAY]


@contextmanager
def deaf_to_hang_up() -> Iterator[None]:
    """With what is started here ignoring the end of its terminal: its sweep's driver sees to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, handler)


@contextmanager
def without_what_is_not_needed() -> Iterator[None]:
    """With a Node that does not start those processes; other versions of Ray start them all."""
    import ray
    from ray._private.node import Node

    tried = ray.__version__.startswith(TRIED_WITH)
    kept = {name: getattr(Node, name) for name in NOT_NEEDED} if tried else {}
    for name in kept:
        setattr(Node, name, nothing)
    try:
        yield
    finally:
        for name, method in kept.items():
            setattr(Node, name, method)


def nothing(*_: Any, **__: Any) -> None:
    """In the place of a method."""
