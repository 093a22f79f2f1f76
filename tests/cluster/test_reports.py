"""From an evaluation to what is said and kept of it."""

import asyncio
from types import SimpleNamespace

import pytest
from support.bundled import HOOK
from support.configs import short_run

from saeray.actors.waiting import NotYet
from saeray.cluster import sweep_state
from saeray.cluster.reports import Reports, missed_target
from saeray.cluster.sweep_state import Entry, SweepState
from saeray.files import strict_json
from saeray.files.metrics_log import read_lines
from saeray.files.storage import Folder
from saeray.spec.messages import DONE, INTERRUPTED, STOPPED, Report


class Harvester:
    """Evaluates every SAE at a hook that does not reach the logits; weights are their L0."""

    def __init__(self):
        self.evaluate = SimpleNamespace(remote=self.answer)
        self.calls = []

    async def answer(self, hooks, held_out, final, *weights):
        self.calls.append(weights)
        for of in weights:
            if isinstance(of, Exception):
                raise of
        return [
            {
                "metrics/CE_loss_score": None,
                "metrics/l0": of,
                "eval/n_tokens": 64,
                "warnings": [f"{hooks[-1]}: no CE loss score"],
                **({"metrics/mdl": 9.0, "features": b"of %d" % of} if final else {}),
            }
            for of in weights
        ]


def stream_of(*harvesters):
    about = SimpleNamespace(widths={HOOK: 16})
    ready = list(range(len(harvesters)))
    return SimpleNamespace(
        held_out="windows", harvesters=harvesters, ready=ready, evaluations=0, about=about
    )


def pack_of(reports, stream, names):
    """A pack on the stream with SAEs of these names."""
    for name in names:
        entry = reports.state.entries[name] = Entry(name, short_run(eval_every=5))
        reports.open(entry)
    return SimpleNamespace(about=SimpleNamespace(name="pack"), stream=stream, members=names)


async def taken(reports, pack, *told):
    """Reports of one call, until they are settled."""
    for report in told:
        reports.take(pack, report)
    while await reports.settled(pack) is not None:
        pass


@pytest.fixture
def reports(monkeypatch, tmp_path):
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(sweep_state.ray, "get_runtime_context", lambda: context)
    return Reports(SweepState("s", str(tmp_path), "roster:s"))


def test_a_figure_without_meaning_is_null_and_its_reason_is_said_once(reports, tmp_path):
    pack = pack_of(reports, stream_of(Harvester()), ["a", "b"])
    asyncio.run(taken(reports, pack, *(Report(n, 5, 40, {}, [3.0]) for n in "ab")))
    assert reports.state.warnings == [f"{HOOK}: no CE loss score"]
    assert reports.evaluation_tokens == 128
    for entry in reports.state.entries.values():
        assert entry.metrics["eval/CE_loss_score"] is None
        assert "eval/CE_loss_score" not in reports.result_of(entry).metrics  # Tune wants numbers
    reports.state.files.write_results(reports.state.outcomes())
    assert [r["ce_loss_score"] for r in reports.state.files.read_rows()] == [None, None]
    memory = strict_json.loads((tmp_path / ".ray" / "roster.json").read_text())
    assert memory["warnings"] == reports.state.warnings  # also after the roster's death


def test_saes_that_report_at_once_are_evaluated_together(reports, monkeypatch):
    harvesters = [Harvester(), Harvester()]
    pack = pack_of(reports, stream_of(*harvesters), list("abcde"))
    told = [Report(n, 5, 40, {}, [float(i)]) for i, n in enumerate("abcde")]
    asyncio.run(taken(reports, pack, *told))
    # Three and two of them, so that both harvesters have some.
    assert [h.calls for h in harvesters] == [[(0.0, 1.0, 2.0)], [(3.0, 4.0)]]
    assert [e.metrics["eval/l0"] for e in reports.state.entries.values()] == [0, 1, 2, 3, 4]
    monkeypatch.setattr("saeray.cluster.reports.SAES_AT_HARVESTER", 2 * (2 * 16 * 64 * 4))
    asyncio.run(taken(reports, pack, *(r._replace(step=10) for r in told)))
    assert [len(weights) for h in harvesters for weights in h.calls[1:]] == [2, 1, 2]


def test_one_that_cant_be_evaluated_keeps_no_other_one_back(reports):
    pack = pack_of(reports, stream_of(Harvester()), list("abc"))
    weights = [1.0, ValueError("no weights"), 3.0]
    told = [Report(n, 5, 40, {}, [w]) for n, w in zip("abc", weights, strict=True)]
    asyncio.run(taken(reports, pack, *told))
    found = [e.metrics.get("eval/l0") for e in reports.state.entries.values()]
    assert found == [1.0, None, 3.0]
    assert "b: not evaluated: no weights" in reports.state.warnings


@pytest.mark.parametrize("interrupted", [False, True])
def test_features_are_written_before_an_sae_has_ended(reports, tmp_path, interrupted):
    """An interrupted one's log shall be that of a run that goes on: it has no last evaluation."""
    pack = pack_of(reports, stream_of(Harvester()), ["a"])
    entry = reports.state.entries["a"]
    file = tmp_path / "trials" / "a" / "features.parquet"
    end, there = reports.end, []

    def ended(*arguments):
        there.append(file.read_bytes())
        end(*arguments)

    reports.end = ended
    reports.state.interrupted = interrupted
    step = entry.config.eval_every
    told = Report("a", step, 8 * step, {}, [7.0], STOPPED if interrupted else DONE)

    async def run():
        await taken(reports, pack, told)
        await reports.rows_written()

    asyncio.run(run())
    assert there == [b"of 7"]
    (line,) = read_lines(Folder.at(tmp_path / "trials" / "a"))
    assert line["eval/l0"] == 7.0
    assert ("eval/mdl" in line) is not interrupted
    assert entry.state == (INTERRUPTED if interrupted else DONE)


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


def test_a_pack_hears_of_every_decision_of_tunes(reports, monkeypatch):
    """A bare trial: what it is told of a step is whole, and its pack waits until it wants more."""
    monkeypatch.setattr("saeray.cluster.reports.POLL_SECONDS", 0.05)
    pack = pack_of(reports, stream_of(Harvester()), ["a", "b"])
    a, b = reports.state.entries.values()
    a.held = a.attached = b.attached = True  # b is a sweep's of ours

    async def run():
        reports.take(pack, Report("a", 5, 40, {}, [3.0]))
        reports.take(pack, Report("b", 5, 40, {}, [3.0]))
        assert not a.to_be_told and b.to_be_told  # its evaluation is on the way
        while await reports.settled(pack) is not None:
            pass
        assert a.to_be_told
        early = await reports.decided(pack)
        a.heard = reports.result_of(a).number  # its trial asks for the next one
        return early, await reports.decided(pack)

    early, answer = asyncio.run(run())
    assert (early.held, early.undecided) == (["a"], ["a"])
    assert (answer.held, answer.undecided) == (["a"], [])
    a.heard, a.withdrawn = 0, True  # or is stopped
    assert asyncio.run(reports.decided(pack)).undecided == []


def test_the_end_of_an_sae_is_settled_when_its_row_is_written_also_if_it_goes_on(reports):
    """A pack it has left must not wait for ever when Tune takes it up again at once."""
    pack = pack_of(reports, stream_of(Harvester()), ["a"])
    entry = reports.state.entries["a"]

    async def run():
        await taken(reports, pack, Report("a", 5, 40, {}), Report("a", 5, 40, {}, [1.0], STOPPED))
        await reports.rows_written()
        entry.state, entry.row_written = "waiting", False
        return reports.answer(pack)

    assert asyncio.run(run()).ended == {"a": 5}


def test_an_l0_that_is_not_the_one_asked_for_is_said():
    def said(l0, **of):
        fields = dict(architecture="gated", target_l0=10) | of
        return missed_target(Entry("sae", short_run(**fields)), {"eval/l0": l0} | held_out)

    held_out = {"eval/n_tokens": 64}
    assert said(10.4) is None
    assert said(12.0).startswith("sae: held-out L0 is 12, 20% above target_l0 = 10;")
    assert "30% below" in said(7.0)
    assert said(12.0, architecture="topk") is None  # its k is what it is
    assert said(12.0, target_l0=None) is None
    held_out.clear()  # it was not evaluated
    assert said(12.0) is None
