"""Whole sweeps whose wandb is silent, or offline and interrupted."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from support.running import STEPS, Ended, config
from support.wandb_files import read_runs, silent_server

from saeray.client.cli import main

pytestmark = pytest.mark.slow


def begin(folder, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "saeray", "sweep", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


def sweep_file(folder, **changes):
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(config() | dict(log_to_wandb=True) | changes))
    return file


def test_a_server_that_never_answers_keeps_nobody_from_training(tmp_path):
    rates = [1e-3 * (i + 1) for i in range(8)]
    file = sweep_file(tmp_path, lr=rates, training_tokens=16 * 1024, expansion_factor=2)
    with silent_server() as (url, taken):
        named = ("--name", "silent", "--storage-path", tmp_path)
        environment = dict(WANDB_BASE_URL=url, WANDB_API_KEY="a" * 40, WANDB_MODE="online")
        started = time.monotonic()
        process = begin(tmp_path, file, *named, **environment)
        said = process.communicate(timeout=300)[0]
        assert time.monotonic() - started < 200  # 60 s for wandb, not 8 times
    assert process.returncode == 0, said
    assert [r["status"] for r in Ended(tmp_path, "silent").rows] == ["done"] * 8
    assert said.count("sends all of it later") >= 1  # in the live view, and in the end
    assert said.splitlines()[-2].startswith("! wandb: ")
    assert taken
    # One run was tried to be opened, and nobody else's.
    assert len(list((tmp_path / "silent" / "wandb").glob("run-*"))) == 1


def test_an_offline_sweep_that_was_resumed_is_sent_whole(tmp_path, monkeypatch):
    # Much of it is left when Ctrl-C is heard, however busy the machine is.
    n_steps = 4 * STEPS
    file = sweep_file(tmp_path, checkpoint_every_s=1.0, training_tokens=n_steps * 1024)
    ended = Ended(tmp_path, "offline")
    process = begin(tmp_path, file, "--name", "offline", "--storage-path", tmp_path)
    deadline = time.monotonic() + 200
    while ended.steps() < STEPS // 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=200)
    resumed = begin(tmp_path, "--resume", tmp_path / "offline")
    assert resumed.wait(timeout=300) == 0
    parts = [r for r in read_runs(tmp_path / "offline") if r.job_type == "sae"]
    assert len(parts) == 4  # two SAEs, two sessions
    assert len({run.id for run in parts}) == 2
    wanted = list(range(5, n_steps + 1, 5))
    assert all([x["_step"] for x in run.history] != wanted for run in parts)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "whole"))
    assert main(["wandb", str(tmp_path / "offline")]) == 0
    *whole, _ = read_runs(tmp_path / "whole")  # and one of the sweep
    assert {run.id for run in whole} == {run.id for run in parts}
    for run in whole:
        assert [x["_step"] for x in run.history] == wanted
