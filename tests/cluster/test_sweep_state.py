"""What a sweep's folder keeps of sessions before this one: a tune.run that was restored."""

import asyncio
import csv
from types import SimpleNamespace

import pytest
import yaml
from support.configs import short_run

from saeray.cluster import sweep_state
from saeray.cluster.sweep_state import Entry, SweepState
from saeray.files.metrics_log import MetricsLog
from saeray.files.storage import Folder
from saeray.spec.messages import DONE, FAILED, INTERRUPTED, TRAINING


@pytest.fixture
def session(monkeypatch, tmp_path):
    """A function from (lr, state) of its SAEs to a session of the sweep in one folder."""
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(sweep_state.ray, "get_runtime_context", lambda: context)

    def begun(*saes, l0=0.0):
        state = SweepState("s", str(tmp_path), "roster:s")
        for lr, of_sae in saes:
            name, config = f"lr={lr}", short_run(lr=lr)
            state.entries[name] = Entry(name, config, of_sae, metrics={"eval/l0": l0})
            line = {"eval/l0": l0, "details/n_training_tokens": 40}
            MetricsLog(Folder.at(tmp_path / "trials" / name)).append(5, line)
        return state

    return begun


def write(state):
    asyncio.run(state.read_earlier())
    state.files.write_results(state.outcomes())
    asyncio.run(state.write_sweep_yaml(SimpleNamespace(as_data=dict)))


def written(tmp_path):
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    saes = yaml.safe_load((tmp_path / "sweep.yaml").read_text())["saes"]
    assert [r["trial"] for r in rows] == list(saes)
    # What a config says of its folder differs by session, and is no column.
    assert rows[0].keys().isdisjoint(("name", "storage_path"))
    return {float(r["lr"]): (r["status"], float(r["l0"])) for r in rows}


def test_saes_of_earlier_sessions_keep_their_rows_and_configs(session, tmp_path):
    write(session((1.0, DONE), (2.0, FAILED), (3.0, TRAINING), (4.0, TRAINING), l0=7.0))
    # The cluster is gone. Tune takes up the two that had not ended; so far one has come.
    restored = session((3.0, DONE), l0=8.0)
    write(restored)
    assert written(tmp_path) == {
        1.0: (DONE, 7.0), 2.0: (FAILED, 7.0), 3.0: (DONE, 8.0), 4.0: (INTERRUPTED, 7.0),
    }  # fmt: skip
    steps = {o.config.lr: o.steps for o in restored.outcomes()}
    assert steps == {1.0: 5, 2.0: 5, 3.0: 0, 4.0: 5}  # 40 tokens, 8 a step; 3.0 has no report yet
    # And a searcher that has another idea after a while.
    write(session((5.0, DONE), l0=9.0))
    assert written(tmp_path)[5.0] == (DONE, 9.0)
    assert written(tmp_path).keys() == {1.0, 2.0, 3.0, 4.0, 5.0}


def test_a_new_folder_has_nothing_to_keep(session, tmp_path):
    state = session((1.0, DONE))
    asyncio.run(state.read_earlier())
    assert state.earlier == {}
