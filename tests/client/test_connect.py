"""A Ray of this process's own, and its end."""

import os
import subprocess

import psutil
import pytest

from saeray.client.connect import connected
from saeray.client.own_ray import NOT_NEEDED
from saeray.errors import SaerayError


def test_a_process_that_does_not_end_by_itself_is_ended_with_ray():
    with connected("local"):
        import ray

        @ray.remote(num_cpus=0)
        def stays():
            # As a worker that hangs in its own exit: a child of Ray's that Ray has forgotten.
            return subprocess.Popen(["sleep", "600"], start_new_session=True).pid

        left = psutil.Process(ray.get(stays.remote()))
        assert left.is_running()
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE


def test_a_ray_of_its_own_has_no_process_without_use_and_its_workers_no_runtime_env():
    from ray._private.node import Node

    before = {name: getattr(Node, name) for name in NOT_NEEDED}
    with connected("local"):
        import ray

        @ray.remote(num_cpus=0)
        def worker():
            from saeray.actors.environment import in_own_ray

            env = ray.get_runtime_context().runtime_env
            return in_own_ray(), dict(env), os.environ["RAY_TRAIN_METRICS_ENABLED"]

        running = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
        assert ray.get(worker.remote()) == (True, {}, "0")
    assert "SAERAY_OWN_RAY" not in os.environ  # of other Rays this process may use
    assert any("raylet" in command for command in running)
    for script in ("monitor.py", "log_monitor.py", "dashboard/dashboard.py"):
        assert not any(script in command for command in running), script
    assert {name: getattr(Node, name) for name in NOT_NEEDED} == before


def test_a_ray_that_does_not_start_is_said_in_a_paragraph(monkeypatch):
    import ray

    from saeray.actors.environment import OWN_RAY
    from saeray.client.own_ray import start_own_ray

    def init(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(SaerayError, match=r"did not start on this machine: The current node timed"):
        start_own_ray()
    assert OWN_RAY not in os.environ
