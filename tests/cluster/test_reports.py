"""From an evaluation to what is said and kept of it."""

import asyncio
from types import SimpleNamespace

import pytest
from support.configs import short_run

from saeray.actors.waiting import NotYet
from saeray.cluster import sweep_state
from saeray.cluster.reports import Reports
from saeray.cluster.sweep_state import Entry, SweepState
from saeray.files import strict_json
from saeray.spec.messages import DONE, Report


class Harvester:
    """Evaluates every SAE at a hook that does not reach the logits."""

    def __init__(self):
        self.evaluate = SimpleNamespace(remote=self.answer)

    async def answer(self, weights, hook_point, held_out):
        return {
            "metrics/CE_loss_score": None,
            "metrics/l0": 3.0,
            "eval/n_tokens": 64,
            "warnings": [f"{hook_point}: no CE loss score"],
        }


@pytest.fixture
def reports(monkeypatch, tmp_path):
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(sweep_state.ray, "get_runtime_context", lambda: context)
    return Reports(SweepState("s", str(tmp_path), "roster:s"))


def test_a_figure_without_meaning_is_null_and_its_reason_is_said_once(reports, tmp_path):
    stream = SimpleNamespace(held_out="windows", harvesters=[Harvester()], ready=[0], evaluations=0)
    entries = [Entry(n, short_run(lr=lr), state=DONE) for n, lr in (("a", 1e-3), ("b", 2e-3))]

    async def evaluated():
        return [await reports.evaluate(e, stream, {}) for e in entries]

    found = asyncio.run(evaluated())
    assert found == [{"metrics/CE_loss_score": None, "metrics/l0": 3.0, "eval/n_tokens": 64}] * 2
    assert reports.state.warnings == ["blocks.2.hook_resid_pre: no CE loss score"]
    assert reports.evaluation_tokens == 128
    for entry, metrics in zip(entries, found, strict=True):
        entry.metrics = metrics
        reports.state.entries[entry.name] = entry
        assert "metrics/CE_loss_score" not in reports.result_of(entry).metrics  # Tune wants numbers
    reports.state.files.write_results(reports.state.outcomes())
    assert [r["ce_loss_score"] for r in reports.state.files.read_rows()] == [None, None]
    memory = strict_json.loads((tmp_path / ".ray" / "roster.json").read_text())
    assert memory["warnings"] == reports.state.warnings  # also after the roster's death


def test_a_pack_may_ask_for_its_reports_up_to_a_step(reports, monkeypatch):
    """It writes a checkpoint of step 8, say, while reports of later steps wait to be evaluated."""
    monkeypatch.setattr("saeray.cluster.reports.POLL_SECONDS", 0.1)
    entry = reports.state.entries["a"] = Entry("a", short_run())
    pack = SimpleNamespace(members=["a"])

    async def asked():
        reports.open(entry)
        await asyncio.wrap_future(reports.track(reports.tracker.log, "a", 8, {"metrics/l0": 1.0}))
        entry.pending.append((Report("a", 12, 96, {}), None))
        early = await reports.settled(pack, {"a": 8})
        return early, dict(reports.answer(pack).settled), await reports.settled(pack, {"a": 12})

    early, settled, late = asyncio.run(asked())
    assert early is None
    assert settled == {"a": 8}
    assert isinstance(late, NotYet)
