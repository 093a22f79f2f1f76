"""Requests for rows in the middle of a training: whoever dies meanwhile, the answer is the same."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from saeray.actors.waiting import NotYet
from saeray.errors import SaerayError
from saeray.spec.messages import RowsFor, RowsWanted
from saeray.stream import row_requests
from saeray.stream.harvester_pool import HarvesterPool

WANTED = RowsWanted("pack", range(3, 35), (RowsFor("sae", "hook", "anthropic", 0, 30),))


class Method:
    """A call of an actor, as Ray has it."""

    def __init__(self, call):
        self.call = call

    def options(self, **_):
        return self

    def remote(self, *args):
        return self.call(*args)


class Harvester:
    def __init__(self, dies_at=(), fails_with=None):
        self.dies_at = dies_at
        self.fails_with = fails_with
        self.rows_for_dead = Method(self.rows)
        self.node = Method(self.up)
        self.asked = []

    def rows(self, block, tokens, saes, *snapshots):
        async def n_tokens():
            await asyncio.sleep(0)
            if block in self.dies_at:
                self.dies_at.discard(block)
                raise ActorDiedError
            if self.fails_with is not None:
                raise self.fails_with
            self.asked.append(block)
            return 10

        assert (tokens, saes, snapshots) == (f"text {block}", WANTED.saes, ("weights",))
        return n_tokens(), f"rows of {block}"

    async def up(self):
        return "its node"


def pool_of(*harvesters):
    async def text(block):
        return f"text {block}"

    return HarvesterPool(
        SimpleNamespace(block=Method(text)), list(harvesters), 1, None, (),
        do=lambda work: asyncio.ensure_future(work), warn=warnings.append, up_again=lambda: None,
    )  # fmt: skip


warnings = []


@pytest.fixture(autouse=True)
def no_old_warnings():
    warnings.clear()


async def answer(requests, wanted=WANTED, n=100):
    for _ in range(n):
        found = await requests.of(wanted, ["weights"])
        if not isinstance(found, NotYet):
            return found
    raise AssertionError(found)


def test_every_block_once_and_again_where_a_harvester_died():
    async def main():
        dies_at = {4, 9, 20}  # whichever has it
        first, second = Harvester(dies_at), Harvester(dies_at)
        pool = pool_of(first, second)
        requests = row_requests.RowRequests(pool)
        assert await answer(requests) == [f"rows of {b}" for b in WANTED.blocks]
        assert sorted(first.asked + second.asked) == list(WANTED.blocks)
        assert pool.in_flight == [0, 0]
        assert pool.resampling_tokens == 320
        # Asked again, as by a pack that was started again, it is there; lost, it is made again.
        await answer(requests)
        assert len(first.asked + second.asked) == 32
        await answer(requests, WANTED._replace(attempt=1))
        assert len(first.asked + second.asked) == 64
        requests.forget("pack")
        assert not requests.newest

    asyncio.run(main())
    assert any("died" in w for w in warnings)


def failing(cause):
    return RayTaskError("rows_for_dead", "", cause)


def test_what_fails_again_and_again_is_said(monkeypatch):
    killed = []
    monkeypatch.setattr(
        "saeray.stream.harvester_pool.ray.kill", lambda actor, no_restart: killed.append(actor)
    )

    async def main():
        pool = pool_of(Harvester(fails_with=failing(MemoryError("no room"))))
        with pytest.raises(SaerayError, match="failed 3 times: no room"):
            await answer(row_requests.RowRequests(pool))
        assert killed  # after an error of a GPU the process is of no use
        said = failing(SaerayError("the model is gone"))
        with pytest.raises(SaerayError, match="the model is gone"):
            await answer(row_requests.RowRequests(pool_of(Harvester(fails_with=said))))

    asyncio.run(main())


def test_weights_that_went_with_their_pack_are_no_failure():
    async def main():
        lost = failing(ObjectLostError("", "", ""))
        harvester = Harvester(fails_with=lost)
        requests = row_requests.RowRequests(pool_of(harvester))
        for _ in range(5):
            assert isinstance(await requests.of(WANTED, ["weights"]), NotYet)
        harvester.fails_with = None  # the pack is there again, and asks with its own
        assert len(await answer(requests)) == 32

    asyncio.run(main())
