"""What a pack waits for where Ray Tune decides: its word on the last report, and not for ever."""

from types import SimpleNamespace

import pytest
import torch

from saeray.cluster import held
from saeray.cluster.held import Decisions
from saeray.cluster.member import taken_of
from saeray.cluster.pack import Pack
from saeray.spec.messages import DONE, STOPPED, TRAINING, Answer, Report


@pytest.fixture
def decisions(monkeypatch):
    """A function from the roster's answers to a pack's decisions and what it has warned of."""
    monkeypatch.setattr(held.waiting, "ask", lambda call, *_: call())

    def made(*answers):
        left, said = list(answers), []
        roster = SimpleNamespace(
            decided=SimpleNamespace(remote=lambda _: left.pop(0) if len(left) > 1 else left[0])
        )
        return Decisions(roster, "pack", 1.0, said.append), said

    return made


def answer(*undecided, withdrawn=()):
    return Answer("i", list(withdrawn), {}, held=["a", "b"], undecided=undecided)


def test_it_waits_until_all_are_decided_on(decisions):
    tune, said = decisions(answer("a", "b"), answer("b"), answer(withdrawn=["b"]))
    tune.take(answer("a", "b"))
    taken = []
    tune.wait(lambda a: (taken.append(a), tune.take(a)))
    assert [list(a.undecided) for a in taken] == [["a", "b"], ["b"], []]
    assert tune.held == {"a", "b"} and not said


def test_nobody_is_asked_where_no_trial_is_a_bare_one(decisions):
    tune, _ = decisions()
    tune.take(Answer("i", [], {}))
    tune.wait(lambda _: pytest.fail("asked"))


def test_a_trial_that_does_not_come_back_is_waited_for_once(decisions, monkeypatch):
    monkeypatch.setattr(held, "DECISION_SECONDS", 0.05)
    tune, said = decisions(answer("a"))
    tune.take(answer("a"))
    tune.wait(tune.take)
    assert said == [
        "a: Ray Tune has not decided on its last result within 0.05 s; it trains on, and may end "
        "later than where Tune stops it."
    ]
    assert tune.held == {"b"}
    tune.take(answer("a"))
    tune.wait(lambda _: pytest.fail("asked again"))


def test_reports_of_an_end_are_settled_by_its_row():
    said = Answer("i", [], {"a": 20}, {"a": -1})
    settled = [Pack.is_settled(None, Report("a", 20, 160, {}, state=s), said)
               for s in (TRAINING, STOPPED, DONE)]  # fmt: skip
    assert settled == [True, False, False]
    assert Pack.is_settled(
        None, Report("a", 20, 160, {}, state=STOPPED), said._replace(ended={"a": 20})
    )


def test_a_checkpoint_takes_the_copy_that_is_there(monkeypatch):
    monkeypatch.setattr("saeray.cluster.member.taken", lambda trainer: ("copy", trainer.step))
    there = SimpleNamespace(step=8, tensors=torch.zeros(1))
    m = SimpleNamespace(trainer=SimpleNamespace(step=8), held=SimpleNamespace(state=there))
    assert taken_of(m) is there
    m.trainer.step = 9
    assert taken_of(m) == ("copy", 9)
    m.held = None
    assert taken_of(m) == ("copy", 9)
