"""Which of the packs that wait are launched: as many as there is room and memory for."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.configs import config

from saeray.cluster import dispatch
from saeray.cluster.dispatch import Dispatch
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
            launches.queue.append(("stream", saes, replace(fitted, **changes)))
        launches.launch_next()
        assert len(launches.queue) + len(state.packs) == 3
        return len(state.packs)

    return count


def test_as_many_packs_are_launched_as_there_is_room_for(launched):
    assert [launched(cpus) for cpus in (1.52, 2.0, 2.9, 8.0)] == [1, 2, 2, 3]
    assert launched(0.5) == 1  # Ray, and an autoscaler, shall see what is waited for


def test_no_more_packs_are_launched_than_memory_has_room_for(launched):
    assert [launched(8.0, most_packs=n) for n in (1, 2, 5)] == [1, 2, 3]
