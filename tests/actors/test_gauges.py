"""Our metrics on Ray: the dashboard asks for those that there are, and none ends a sweep."""

import json
import re
from types import SimpleNamespace

import pytest
import ray
from ray.util import metrics
from support.bundled import ROOT

from saeray.actors.gauges import COUNTER, GAUGE, METRICS, Meter
from saeray.actors.names import in_words, tags_of
from saeray.cluster.pack_gauges import PackMeter
from saeray.spec.messages import Gauges, ReaderGauges
from saeray.stream.buffer_gauges import tell

DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "saeray.json").read_text())
OURS = re.compile(r"\bray_(saeray_\w+?)(_total)?\b(?!\w)")
PANELS = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
EXPRESSIONS = [(t["expr"], t["legendFormat"]) for p in PANELS for t in p["targets"]]


class Recorded:
    """In the place of a metric of Ray."""

    made: dict = {}  # noqa: RUF012

    def __init__(self, name, description, tag_keys):
        self.of = METRICS[name]
        assert (description, tag_keys) == (self.of.words, self.of.tags)
        self.values = []
        Recorded.made[name] = self

    def set_default_tags(self, tags):
        assert tuple(tags) == self.of.tags
        self.tags = tags
        return self

    def set(self, value):
        assert self.of.kind == GAUGE
        self.values.append(value)

    def inc(self, value):
        assert self.of.kind == COUNTER
        assert value > 0
        self.values.append(value)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(metrics, "Gauge", Recorded)
    monkeypatch.setattr(metrics, "Counter", Recorded)
    monkeypatch.setattr(Recorded, "made", {})
    return Recorded.made


def test_the_dashboard_asks_for_all_there_are_and_for_no_other():
    asked = {m[1]: bool(m[2]) for e, _ in EXPRESSIONS for m in OURS.finditer(e)}
    assert asked.keys() == METRICS.keys()
    for name, total in asked.items():
        assert total == (METRICS[name].kind == COUNTER), name
    variables = json.dumps(DASHBOARD["templating"])
    assert {m[1] for m in OURS.finditer(variables)} <= METRICS.keys()


@pytest.mark.parametrize(("expression", "legend"), EXPRESSIONS)
def test_an_expression_uses_tags_that_its_metrics_have(expression, legend):
    used = set(re.findall(r"\{\{(\w+)\}\}", legend))
    for names in re.findall(r"by \(([\w, ]+)\)", expression):
        assert used <= set(names.split(", "))
        used |= set(names.split(", "))
    for match in OURS.finditer(expression):
        of = METRICS[match[1]]
        assert used <= set(of.tags)
        around = expression[max(0, match.start() - 5) : match.start()]
        assert around.endswith("rate(") == (of.kind == COUNTER)
        assert expression[match.end() :].startswith('{sweep=~"$sweep"}')
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)


def test_its_panels_lie_beside_each_other():
    places = [p["gridPos"] for p in DASHBOARD["panels"]]
    cells = [(x, y) for g in places for x in range(g["x"], g["x"] + g["w"])
             for y in range(g["y"], g["y"] + g["h"])]  # fmt: skip
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    ids = [p["id"] for p in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_docs_name_every_metric():
    text = (ROOT / "docs" / "cluster.md").read_text()
    assert [name for name in METRICS if name.removeprefix("saeray_") not in text] == []


def test_a_buffer_tells_what_it_holds(recorded):
    meter = Meter(**tags_of("roster:mine:0a1b2c/stream-12ab34/buffer"))
    now = Gauges(
        harvested_tokens=4096, slots=6, used=5, ready=3, harvest_seconds=1.0, elapsed_seconds=2.0,
        n_harvesters=2, readers={"a": 1, "b": 2}, detached=["b"], n_down=1,
    )  # fmt: skip
    tell(meter, now)
    tell(meter, now._replace(harvested_tokens=5120))
    values = {name: made.values for name, made in recorded.items()}
    assert values == {
        "saeray_buffer_slots": [6, 6],
        "saeray_buffer_used_blocks": [5, 5],
        "saeray_buffer_ready_blocks": [3, 3],
        "saeray_buffer_readers": [2, 2],
        "saeray_buffer_detached_readers": [1, 1],
        "saeray_harvesters": [1, 1],
        "saeray_harvested_tokens": [4096, 1024],  # what has come since
        "saeray_cached_tokens": [],
        "saeray_resampling_tokens": [],
    }
    assert recorded["saeray_buffer_slots"].tags == {"sweep": "mine", "stream": "stream-12ab34"}


def test_a_pack_tells_what_it_trains_without_earlier_sessions(recorded):
    members = [SimpleNamespace(n_training_tokens=1000), SimpleNamespace(n_training_tokens=1000)]
    meter = PackMeter("mine", "pack-002-0a1b2c3d", members)
    members[0].n_training_tokens = 1600
    meter.tell(ReaderGauges(1.0, 3.0, 2.0), ())
    members[1].n_training_tokens = 1100
    meter.tell(ReaderGauges(1.0, 4.0, 2.5), {"gone"})
    values = {name: made.values for name, made in recorded.items()}
    assert values == {
        "saeray_pack_saes": [2, 1],
        "saeray_pack_trained_tokens": [600, 100],
        "saeray_pack_waiting_seconds": [1.0],
        "saeray_pack_busy_seconds": [3.0, 1.0],
        "saeray_pack_step_seconds": [2.0, 0.5],
    }
    assert recorded["saeray_pack_saes"].tags == {"sweep": "mine", "pack": "pack-002"}


def test_a_metric_that_fails_is_the_last_and_nothing_else(recorded, monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("no agent")

    monkeypatch.setattr(Recorded, "inc", fails)
    meter = Meter(sweep="mine", stream="s", harvester="0")
    meter.add(saeray_harvester_tokens=1024)
    meter.add(saeray_harvester_tokens=1024)
    assert meter.off
    assert [r.message for r in caplog.records] == ["metrics are switched off for this process"]


@pytest.mark.parametrize(
    ("name", "tags", "words"),
    [
        (
            "roster:mine:0a1b2c/stream-12ab34/harvester-1",
            {"sweep": "mine", "stream": "stream-12ab34", "harvester": "1"},
            "mine: harvester-1",
        ),
        ("stream:0f0f/buffer", {"sweep": "", "stream": "stream:0f0f"}, "stream:0f0f/buffer"),
        ("roster:a:b:0a1b2c/pack-001-0a1b2c3d", None, "a:b: pack-001-0a1b2c3d"),
        ("roster:mine:0a1b2c", {}, "mine: roster"),
        ("", {}, ""),
    ],
)
def test_names_of_actors(name, tags, words):
    assert in_words(name) == words
    if tags is not None:  # of a stream's actors
        assert tags_of(name) == tags


def test_without_ray_nobody_is_told():
    assert not ray.is_initialized()
    meter = Meter(sweep="mine", stream="s")
    meter.tell(saeray_buffer_slots=1)
    assert meter.known == {}
