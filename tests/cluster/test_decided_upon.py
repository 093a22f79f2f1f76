"""What a trial is told of an SAE that a scheduler or searcher decides upon."""

import asyncio
from types import SimpleNamespace

import pytest
from support.configs import short_run

from saeray.cluster import sweep_state
from saeray.cluster.reports import Reports
from saeray.cluster.sweep_state import Entry, SweepState
from saeray.files.metrics_log import read_lines
from saeray.spec.messages import EVALUATING, STOPPED, TRAINING, Report

FOUND = {"eval/CE_loss_score": 0.5, "eval/n_tokens": 64}


@pytest.fixture
def reports(monkeypatch, tmp_path):
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(sweep_state.ray, "get_runtime_context", lambda: context)
    return Reports(SweepState("s", str(tmp_path), "roster:s"))


def entry_of(reports, **changes):
    entry = Entry("a", short_run(wandb_log_frequency=2, **changes), state=TRAINING)
    reports.state.entries["a"] = entry
    return entry


PACK = SimpleNamespace(members=["a"])


async def settled(reports, entry, step, evaluation):
    """The report of a step, with or without what its evaluation finds."""
    pending = None
    if evaluation is not None:
        pending = asyncio.get_running_loop().create_future()
        pending.set_result(evaluation)
    entry.step, entry.n_training_tokens = step, 8 * step
    entry.pending.append((Report("a", step, 8 * step, {"metrics/l0": 1.0}), pending))
    asked = list(reports.answer(PACK).unevaluated)
    await reports.settle(entry)
    return asked


def test_its_pack_is_asked_for_a_first_evaluation_once(reports):
    entry = entry_of(reports, eval_every=0)

    async def asked():
        reports.open(entry)
        before = list(reports.answer(PACK).unevaluated)  # nobody decides
        entry.decided_upon = True
        first = list(reports.answer(PACK).unevaluated)
        under_way = await settled(reports, entry, 2, FOUND)
        return before, first, under_way, await settled(reports, entry, 4, None)

    assert asyncio.run(asked()) == ([], ["a"], [], [])
    told = reports.result_of(entry)
    assert (told.step, told.metrics["eval/CE_loss_score"]) == (4, 0.5)  # the last known one


def test_the_log_is_that_of_one_that_nobody_decided_upon(reports):
    entry = entry_of(reports, eval_every=4)

    async def trained():
        reports.open(entry)
        entry.decided_upon = True
        for step, evaluation in ((2, FOUND), (4, FOUND), (6, None)):
            await settled(reports, entry, step, evaluation)
        await reports.close()

    asyncio.run(trained())
    lines = read_lines(reports.state.folder / "trials" / "a")
    assert [line["step"] for line in lines if "eval/CE_loss_score" in line] == [4]
    assert [line["step"] for line in lines] == [2, 4, 6]


def test_a_result_is_told_once_it_is_whole(reports):
    entry = entry_of(reports)
    assert entry.to_be_told
    entry.decided_upon = True
    assert not entry.to_be_told
    entry.metrics = FOUND
    assert entry.to_be_told
    entry.state = EVALUATING  # its last step is told with its end
    assert not entry.to_be_told
    entry.state = STOPPED
    assert not entry.to_be_told
    entry.row_written = True
    assert entry.to_be_told


def test_the_path_is_known_before_the_end(reports, tmp_path):
    entry = entry_of(reports)
    assert reports.result_of(entry).path == str(tmp_path / "trials" / "a" / "final")
