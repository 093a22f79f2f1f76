"""What others hold of the cluster's nodes."""

import asyncio
import sys
import time

import ray

from saeray.actors.nodes import held_by_others
from saeray.cluster import streams

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Holder:
    def ready(self):
        pass


def until_nothing_is_held():
    deadline = time.monotonic() + 30
    while held_by_others() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert held_by_others() == {}


def test_nothing_held_is_nothing_to_wait_for(ray_instance, monkeypatch):
    async def sleep(seconds):
        raise AssertionError(f"waits {seconds} s for nothing")

    until_nothing_is_held()
    monkeypatch.setattr(streams.asyncio, "sleep", sleep)
    assert asyncio.run(streams.settled_holdings()) == {}


def test_what_an_actor_holds_is_told_of_its_node(ray_instance):
    until_nothing_is_held()
    holder = ray.remote(Holder).options(num_cpus=0.5).remote()
    ray.get(holder.ready.remote())
    (node,) = [n["NodeID"] for n in ray.nodes()]
    deadline = time.monotonic() + 10
    while not held_by_others() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert held_by_others() == {node: {"CPU": 0.5}}
    assert asyncio.run(streams.settled_holdings()) == {node: {"CPU": 0.5}}
    ray.kill(holder)
    until_nothing_is_held()
