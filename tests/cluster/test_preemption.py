"""The notice that a node is about to be taken away, without nodes."""

import time

from ray._private.state import state

from saeray.actors.environment import OWN_RAY
from saeray.cluster import preemption
from saeray.cluster.preemption import Notice


def given(notice, within=5.0):
    deadline = time.monotonic() + within
    while not notice.given and time.monotonic() < deadline:
        time.sleep(0.01)
    return notice.given


def test_it_is_of_ones_own_nodes_and_survives_a_look_that_fails(monkeypatch):
    answers = [{}, {"another": 0}, ConnectionError("the GCS is away"), {"another": 0, "b": 0}]
    looked = []

    def get_draining_nodes():
        looked.append(answers[min(len(looked), 3)])
        if isinstance(looked[-1], Exception):
            raise looked[-1]
        return looked[-1]

    monkeypatch.delenv(OWN_RAY, raising=False)
    monkeypatch.setattr(preemption, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(state, "get_draining_nodes", get_draining_nodes)
    notice = Notice({"a", "b"})
    assert given(notice)
    assert looked == answers  # not before it was one of its own, and not once more after


def test_nobody_looks_where_no_node_can_go(monkeypatch):
    monkeypatch.setattr(preemption, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(preemption, "leaving_nodes", lambda: {"a"})
    monkeypatch.delenv(OWN_RAY, raising=False)
    assert not given(Notice(set()), within=0.2)
    monkeypatch.setenv(OWN_RAY, "1")
    assert not given(Notice({"a"}), within=0.2)
