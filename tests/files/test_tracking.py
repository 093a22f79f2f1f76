"""metrics.jsonl has each step once; wandb has each SAE once, and may be missing or silent."""

import json
import shutil
import sys
import threading
import time

import pytest
import yaml
from support.configs import short_run
from support.pictured import pictured
from support.wandb_files import read_runs, silent_server

from saeray.client.cli import main
from saeray.files import wandb_runs
from saeray.files.metrics_log import MetricsLog, read_lines
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.files.tracking import Tracker
from saeray.files.wandb_runs import sweep_id
from saeray.spec.messages import FAILED

LOGGED = short_run(log_to_wandb=True)


@pytest.fixture
def own_wandb():
    """wandb reads its environment once a process, unless it is torn down."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def offline(monkeypatch, tmp_path, own_wandb):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "whole"))


def logged(folder, steps, names=("a", "b")):
    """A session of a sweep in this folder."""
    tracker = Tracker(Folder.at(folder))
    for name in names:
        tracker.open(name, LOGGED)
        for step in steps:
            tracker.log(name, step, {"losses/mse_loss": 1 / step, "eval/CE_loss_score": None})
        tracker.finish(name, failed=False)
    tracker.close()
    return tracker


def test_the_line_of_an_end_at_the_step_of_the_newest_line_replaces_it(tmp_path):
    log = MetricsLog(Folder.at(tmp_path))
    assert log.append(4, {"metrics/l0": 1.0})
    assert log.append(8, {"metrics/l0": 0.5})
    assert log.append(8, {"metrics/l0": 0.5, "eval/l0": 0.6}, last=True)  # stopped there by Tune
    assert not log.append(8, {"metrics/l0": 0.5, "eval/l0": 0.6}, last=True)  # told again
    lines = read_lines(Folder.at(tmp_path))
    assert lines == [
        {"step": 4, "metrics/l0": 1.0},
        {"step": 8, "metrics/l0": 0.5, "eval/l0": 0.6},
    ]
    assert log.append(12, {"metrics/l0": 0.4})  # taken up again
    assert len(read_lines(Folder.at(tmp_path))) == 3


def test_metrics_are_logged_once_per_step_even_after_a_restart(tmp_path):
    log = MetricsLog(Folder.at(tmp_path))
    assert log.append(4, {"losses/mse_loss": 1.0})
    assert log.append(8, {"losses/mse_loss": 0.5})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 12, "los')  # cut off by a crash
    again = MetricsLog(Folder.at(tmp_path))
    assert not again.append(8, {"losses/mse_loss": 0.5})
    assert again.append(12, {"losses/mse_loss": 0.4})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8, 12]


def test_wandb_that_is_missing_is_one_warning(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what importing it then raises is ImportError
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = logged(tmp_path, [4, 8])
    (warning,) = tracker.warnings
    assert warning.startswith("wandb: not installed. metrics.jsonl goes on")
    assert len((tmp_path / "trials" / "b" / "metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_is_left_alone_until_there_is_a_line_for_it(offline, tmp_path):
    tracker = Tracker(Folder.at(tmp_path))
    tracker.open("a", LOGGED)
    assert tracker.wandb.thread is None
    assert not (tmp_path / "wandb").exists()
    tracker.log("a", 4, {"losses/mse_loss": 0.5})
    tracker.close()
    assert tracker.warnings == []
    assert (tmp_path / "wandb").is_dir()


@pytest.mark.parametrize(
    ("mode", "config"), [("disabled", LOGGED), ("offline", short_run(log_to_wandb=False))]
)
def test_wandb_that_is_not_wanted_is_left_alone(monkeypatch, tmp_path, mode, config):
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker = Tracker(Folder.at(tmp_path))
    tracker.open("a", config)
    tracker.log("a", 4, {})
    tracker.close()
    assert tracker.warnings == []
    assert not (tmp_path / "wandb").exists()


def test_a_silent_server_costs_one_wait_and_one_warning(monkeypatch, tmp_path, own_wandb):
    monkeypatch.setattr(wandb_runs, "WANDB_SECONDS", 2.0)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with silent_server() as (url, taken):
        monkeypatch.setenv("WANDB_BASE_URL", url)
        tracker = Tracker(Folder.at(tmp_path))
        names = [f"sae-{i}" for i in range(8)]
        started = time.monotonic()
        for name in names:
            tracker.open(name, LOGGED)
        for step in (4, 8):
            for name in names:
                assert tracker.log(name, step, {"losses/mse_loss": 0.5}) == step
        assert time.monotonic() - started < 1.0  # nobody waits for wandb
        tracker.close()
        assert 2.0 <= time.monotonic() - started < 8.0  # once, not eight times
    (warning,) = tracker.warnings
    assert f"`saeray wandb {tmp_path}` sends all of it later" in warning
    assert len(taken) == 1
    for name in names:
        assert (tmp_path / "trials" / name / "metrics.jsonl").read_text().count("\n") == 2


class Hanging:
    """A run whose server went silent after it was opened: its end raises, or never comes."""

    raises = True

    def __init__(self, *_):
        pass

    def log(self, metrics, step):
        pass

    def finish(self, failed):
        if self.raises:
            raise TimeoutError("run.finish()\ntimed out.")
        threading.Event().wait()


@pytest.mark.parametrize("raises", [True, False])
def test_a_server_that_goes_silent_later_is_one_warning_too(monkeypatch, tmp_path, raises):
    monkeypatch.setattr(Hanging, "raises", raises)
    monkeypatch.setattr(wandb_runs, "WandbRun", Hanging)
    monkeypatch.setattr(wandb_runs, "CLOSE_SECONDS", 0.2)
    monkeypatch.setenv("WANDB_MODE", "online")
    tracker = logged(tmp_path, [4, 8], names="abcd")
    (warning,) = tracker.warnings
    reason = "run.finish() timed out" if raises else "not all was taken within 0.2 s"
    assert warning.startswith(f"wandb: {reason}. metrics.jsonl goes on")


def test_lines_that_wait_for_wandb_are_bounded(monkeypatch, tmp_path):
    monkeypatch.setattr(Hanging, "raises", False)
    monkeypatch.setattr(wandb_runs, "WandbRun", Hanging)
    monkeypatch.setattr(wandb_runs, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(wandb_runs, "MOST_IN_LINE", 50)
    monkeypatch.setenv("WANDB_MODE", "online")
    tracker = logged(tmp_path, range(1, 30), names="abcd")  # the first one's end never comes
    (warning,) = tracker.warnings
    assert warning.startswith("wandb: it is too slow for this sweep, 50 lines wait for it.")
    assert tracker.wandb.calls.qsize() <= 51  # and what `close` waits for
    assert (tmp_path / "trials" / "d" / "metrics.jsonl").read_text().count("\n") == 29


def test_run_ids_are_the_sweeps_own(offline, tmp_path):
    """Of two sweeps they are disjoint, after rm -r new, and after a resume the same."""
    ids = []
    for folder in ("x", "y"):
        logged(tmp_path / folder, [4])
        ids.append({run.name: run.id for run in read_runs(tmp_path / folder)})
    assert ids[0].keys() == ids[1].keys() == {"a", "b"}
    assert len({*ids[0].values(), *ids[1].values()}) == 4
    logged(tmp_path / "x", [8])
    resumed = read_runs(tmp_path / "x")
    assert [run.id for run in resumed if run.name == "a"] == [ids[0]["a"]] * 2
    shutil.rmtree(tmp_path / "x")
    logged(tmp_path / "x", [4])
    assert {run.id for run in read_runs(tmp_path / "x")}.isdisjoint(ids[0].values())


def test_sweeps_on_object_storage_have_ids_of_their_own(s3):
    bucket = s3("ids")
    first, second = (Folder.at(bucket) / name for name in ("first", "second"))
    assert sweep_id(first) == sweep_id(first) != sweep_id(second)


def test_runs_that_an_earlier_version_began_are_gone_on_with(tmp_path):
    (tmp_path / "wandb" / "offline-run-20260101_000000-abc").mkdir(parents=True)
    assert sweep_id(Folder.at(tmp_path)) == str(tmp_path)  # what ids were made of


def test_a_resumed_sweep_is_sent_as_whole_runs(offline, tmp_path, capsys):
    """wandb's own offline folders each hold a part; `saeray wandb` makes whole ones."""
    folder = tmp_path / "sweep"
    logged(folder, [4, 8])
    logged(folder, [4, 8, 12, 16])
    parts = [[x["_step"] for x in run.history] for run in read_runs(folder) if run.name == "a"]
    assert sorted(parts) == [[4, 8], [12, 16]]
    configs = {"a": LOGGED.to_dict(), "b": LOGGED.to_dict(), "never trained": LOGGED.to_dict()}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"saes": configs}))
    assert main(["wandb", str(folder)]) == 0
    assert "2 wandb runs, each one whole: a, b" in capsys.readouterr().out
    whole = read_runs(tmp_path / "whole")
    assert [run.name for run in whole] == ["a", "b"]
    for run in whole:
        assert [x["_step"] for x in run.history] == [4, 8, 12, 16]
        assert [x["losses/mse_loss"] for x in run.history] == [1 / 4, 1 / 8, 1 / 12, 1 / 16]
        assert run.group == "sweep"
        assert run.id in {part.id for part in read_runs(folder) if part.name == run.name}
    assert main(["wandb", str(tmp_path / "nothing")]) == 2


def test_wandb_that_does_not_take_a_sweep_is_said_in_a_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"saes": {"a": LOGGED.to_dict()}}))
    MetricsLog(Folder.at(tmp_path / "trials" / "a")).append(4, {})
    monkeypatch.setattr(wandb_runs, "WandbRun", Hanging)
    assert main(["wandb", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "saeray: wandb does not take a: run.finish() timed out.\n"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["wandb", str(tmp_path)]) == 2
    assert "pip install wandb" in capsys.readouterr().err


def test_the_sweep_has_a_run_beside_those_of_its_saes(offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    logs = dict(log_to_wandb=True, log_weights_to_wandb=True)
    folder = pictured(tmp_path / "six", l1_coefficient=[1e-3, 2e-3, 4e-3], ends={2: FAILED}, **logs)
    rows = SweepFolder(folder, "six").read_rows()
    for row in rows[:2]:
        (folder / "trials" / row["trial"] / "final").publish({"cfg.json": b"{}", "w": b"123"})
    assert main(["wandb", folder.path]) == 0
    assert "4 wandb runs" in capsys.readouterr().out
    *saes, sweep = read_runs(tmp_path / "whole")
    assert [run.name for run in saes] == [row["trial"] for row in rows]
    assert {run.group for run in (*saes, sweep)} == {"six"}
    assert [run.job_type for run in (*saes, sweep)] == ["sae"] * 3 + ["sweep"]
    for run, row in zip(saes[:2], rows[:2], strict=True):
        figures = {c: run.summary[c] for c in ("l0", "fvu", "ce_loss_score", "kl_div")}
        assert figures == {c: row[c] for c in figures}
        (files,) = run.artifacts.values()
        assert files == ["cfg.json", "w"]
    assert saes[2].artifacts == {}
    assert sweep.name == "six" and sweep.id not in {run.id for run in saes}
    assert (sweep.summary["saes/done"], sweep.summary["saes/failed"]) == (2, 1)
    assert sweep.summary["best/fvu"] == min(row["fvu"] for row in rows[:2])
    table = sweep.tables["frontier"]
    told = [dict(zip(table["columns"], data, strict=True)) for data in table["data"]]
    assert [t["trial"] for t in told] == [row["trial"] for row in rows]
    assert [t["frontier"] for t in told] == ["FVU CE", "FVU CE", ""]
    points = sweep.tables["l0_ce_loss_score_table"]
    assert points["columns"] == ["l0", "ce_loss_score", "SAE"]
    assert points["data"] == [[r["l0"], r["ce_loss_score"], r["trial"]] for r in rows[:2]]
