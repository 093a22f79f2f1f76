"""A Ray of this process's own, and its end."""

import subprocess

import psutil

from saeray.client.connect import connected


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
