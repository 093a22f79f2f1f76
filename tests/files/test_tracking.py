"""metrics.jsonl has each step once, and wandb may be missing."""

import json

from support.configs import short_run

from saeray.files.metrics_log import MetricsLog
from saeray.files.storage import Folder
from saeray.files.tracking import NoRun, open_run


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
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)  # what importing it then raises is ImportError
    monkeypatch.setenv("WANDB_MODE", "offline")
    run, warning = open_run(short_run(log_to_wandb=True), "a", "s", Folder.at(tmp_path))
    assert isinstance(run, NoRun)
    assert "wandb is not installed" in warning
    run, warning = open_run(short_run(log_to_wandb=False), "a", "s", Folder.at(tmp_path))
    assert isinstance(run, NoRun)
    assert warning is None
