"""Which harvester gets blocks, without Ray: those of nodes that are taken away get no more."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorUnavailableError

from saeray.actors.environment import OWN_RAY
from saeray.stream import harvester_pool
from saeray.stream.harvester_pool import HarvesterPool


class Actor:
    """A harvester that is for a moment nowhere when it has been ended, then on the next node."""

    def __init__(self, *nodes):
        self.nodes = list(nodes)
        self.node = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self.where))

    async def where(self):
        if self.nodes[0] is None:
            self.nodes.pop(0)
            raise ActorUnavailableError("restarting", b"0" * 16)
        return self.nodes[0]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.delenv(OWN_RAY, raising=False)
    monkeypatch.setattr(harvester_pool, "LOOK_AT_NODES_SECONDS", 0.01)


def test_a_harvester_leaves_its_node_when_it_has_done_what_it_was_given(quick, monkeypatch):
    leaving, ended, warnings, up = set(), [], [], []
    monkeypatch.setattr(harvester_pool, "leaving_nodes", lambda: set(leaving))

    def kill(actor, no_restart):
        assert not no_restart
        ended.append(actor)
        actor.nodes.pop(0)

    monkeypatch.setattr(harvester_pool.ray, "kill", kill)
    stays, goes = Actor("a"), Actor("b", None, "b", "c")  # at first it is found where it was

    async def story():
        pool = HarvesterPool(
            None, [stays, goes], 1, None, (),
            do=lambda work: asyncio.ensure_future(work), warn=warnings.append,
            up_again=lambda: up.append(dict(enumerate(goes.nodes))),
        )  # fmt: skip
        watching = asyncio.ensure_future(pool.watch_nodes())
        pool.taken(1)
        pool.taken(0)
        await asyncio.sleep(0.05)
        assert not pool.down  # nobody leaves
        leaving.add("b")
        await asyncio.sleep(0.1)
        assert pool.down == {1}
        assert pool.free() == 0  # though it has as much to do
        assert not ended  # it still has a block
        pool.in_flight[1] = 0
        await asyncio.sleep(0.2)
        assert ended == [goes]
        assert pool.down == {1}  # it was started again on the node that it has left
        goes.nodes.pop(0)
        await asyncio.sleep(0.5)
        assert (pool.down, goes.nodes, len(up)) == (set(), ["c"], 1)
        await asyncio.sleep(0.05)
        assert (ended, len(warnings)) == ([goes], 1)
        assert "harvester 1 leaves its node" in warnings[0]
        watching.cancel()

    asyncio.run(story())
