"""Which packs are launched: as many as there is room and memory for; and again, when killed."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.configs import config

from saeray.cluster import dispatch
from saeray.cluster.dispatch import IDLE_SECONDS, LAUNCHES, Dispatch, Queued
from saeray.cluster.launcher import AboutPack, Ended
from saeray.cluster.sweep_state import PackState
from saeray.files.storage import Folder
from saeray.spec.grid import SAE
from saeray.spec.placement import fit
from saeray.spec.resources import Resources
from saeray.spec.room import Cluster, Node, Room


class Launches(Dispatch):
    """Starts no process: what it has launched trains for ever."""

    def begin_following(self, pack, config):
        pack.task = SimpleNamespace(done=lambda: False)


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """How many of three packs of one CPU are launched where so many CPUs are free."""
    monkeypatch.setattr(dispatch, "start_launcher", lambda *_: None)
    monkeypatch.setattr(dispatch.ray, "get_actor", lambda *_: None)
    monkeypatch.setattr(dispatch, "namespace", lambda: "ns")
    fitted = fit(Resources(trainer_cpus=1), Cluster.one_machine(2), 1, use_gpu=False)

    def count(cpus, **changes):
        names = ["a", "b", "c"]
        state = SimpleNamespace(
            name="sweep", folder=Folder.at(tmp_path), incarnation="0" * 8, packs={}, error=None,
            over=False, entries={name: SimpleNamespace(state="waiting") for name in names},
        )  # fmt: skip
        streams = SimpleNamespace(room=lambda: Room([Node("n", {"CPU": cpus})]))
        launches = Launches(state, None, streams)
        for name in names:
            saes = [SAE(name, config())]
            launches.queue.append(Queued("stream", saes, replace(fitted, **changes)))
        launches.launch_next()
        assert len(launches.queue) + len(state.packs) == 3
        return len(state.packs)

    return count


def test_as_many_packs_are_launched_as_there_is_room_for(launched):
    assert [launched(cpus) for cpus in (1.52, 2.0, 2.9, 8.0)] == [1, 2, 2, 3]
    assert launched(0.5) == 1  # Ray, and an autoscaler, shall see what is waited for


def test_no_more_packs_are_launched_than_memory_has_room_for(launched):
    assert [launched(8.0, most_packs=n) for n in (1, 2, 5)] == [1, 2, 3]


class Follows(Dispatch):
    """A pack that ends as it is told, without a process."""

    def __init__(self, state, reports, ended, saved):
        async def called(_):
            return SimpleNamespace(about=SimpleNamespace(most_packs=0), buffer=None)

        super().__init__(state, reports, SimpleNamespace(called=called))
        self.ended, self.saved = ended, iter(saved)

    async def expected(self, pack, stream):
        pack.announced = True

    async def end_of(self, pack, limit):
        pack.stream = None
        return self.ended

    def saved_tokens(self, names):
        return next(self.saved)

    def tidy(self):
        pass


@pytest.mark.parametrize(
    ("killed", "tries", "saved", "again"),
    [
        (True, 0, (0, 0), 1),  # before its first checkpoint: launched again, and counted
        (True, LAUNCHES - 2, (0, 0), LAUNCHES - 1),
        (True, LAUNCHES - 1, (0, 0), None),
        (True, LAUNCHES - 1, (0, 8), 0),  # it got on
        (False, 0, (8, 8), None),  # it failed by itself, and would again
        (False, 2, (0, 8), 0),
    ],
)
def test_a_pack_that_was_killed_is_launched_again_so_many_times(killed, tries, saved, again):
    said, ended = [], {}
    entry = SimpleNamespace(name="a", config=config(), ended=False, settling=None)

    async def warn(text):
        said.append(text)

    state = SimpleNamespace(
        entries={"a": entry}, packs={}, over=False, error=None, warn=warn
    )  # fmt: skip
    reports = SimpleNamespace(end=lambda e, state, error: ended.update({e.name: (state, error)}))
    follows = Follows(state, reports, Ended("its launcher died", killed), saved)
    fitted = fit(Resources(trainer_cpus=1), Cluster.one_machine(2), 1, use_gpu=False)
    pack = PackState(AboutPack("pack-1", "stream", {"a": {}}, fitted, tries))
    asyncio.run(follows.follow(pack, config()))
    if again is None:
        assert list(follows.queue) == []
        assert ended["a"][0] == "interrupted"
        assert "its launcher died" in ended["a"][1]
    else:
        assert [waits.tries for waits in follows.queue] == [again]
        assert ended == {}
        assert "started again" in said[0]
    assert pack.through  # what may be left of it is not listened to


def test_saes_that_wait_while_nothing_runs_are_launched_and_not_for_ever(monkeypatch):
    now, launched, given_up = [0.0], [], []
    monkeypatch.setattr(dispatch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    entry = SimpleNamespace(name="a", config=config(), state="waiting", withdrawn=False)
    state = SimpleNamespace(entries={"a": entry}, packs={}, over=False, error=None)
    reports = SimpleNamespace(give_up=given_up.append)
    dispatched = Dispatch(state, reports, None)

    async def launch(entries):
        launched.append((now[0], [e.name for e in entries]))

    dispatched.launch = launch
    limit = config().wait_limit_s
    for seconds in (1.0, 1.0 + IDLE_SECONDS, 12.0, 13.0, limit, limit + 2.0):
        now[0] = seconds
        asyncio.run(dispatched.start_idlers())
    assert launched == [(12.0, ["a"]), (13.0, ["a"]), (limit, ["a"])]
    (error,) = given_up
    assert "wait_limit_s" in str(error)
    # One that runs is what the others may wait for.
    now[0], state.packs["p"] = 10 * limit, SimpleNamespace(task=SimpleNamespace(done=lambda: False))
    asyncio.run(dispatched.start_idlers())
    assert (len(launched), len(given_up), dispatched.idle_since) == (3, 1, None)
