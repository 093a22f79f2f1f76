"""A bare tune.run that is interrupted and restored keeps what had finished before."""

import csv
import json
import signal
import subprocess
import sys
import time

import pytest
import yaml
from support.running import harvesters_below, held

from saeray.files.checkpoint import load_sae

# Two SAEs that are soon done, and two that train on for a while.
SHORT, LONG = 16 * 1024, 600 * 1024

PROGRAM = """
import json, sys
import ray, saeray
from ray import tune

config, place = json.loads(sys.argv[1]), sys.argv[2]
ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
if tune.Tuner.can_restore(place + "/restored"):
    tuner = tune.Tuner.restore(place + "/restored", saeray.SAETrial)
else:
    space = {k: tune.grid_search(v) if isinstance(v, list) else v for k, v in config.items()}
    run = tune.RunConfig(name="restored", storage_path=place, verbose=0)
    tuner = tune.Tuner(saeray.SAETrial, param_space=space, run_config=run)
results = tuner.fit()
best = results.get_best_result(metric="metrics/CE_loss_score", mode="max")
print("RESULT", saeray.load_sae(best.metrics["path"]).d_in)
"""


def start(config, place):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(config), str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def rows(folder):
    file = folder / "results.csv"
    return list(csv.DictReader(file.open())) if file.exists() else []


@pytest.mark.slow
def test_a_restored_tune_run_keeps_the_saes_that_had_finished(tiny, tmp_path):
    config = tiny | dict(lr=[1e-3, 2e-3], training_tokens=[SHORT, LONG], stream_tokens=LONG)
    folder = tmp_path / "restored"
    first = start(config, tmp_path)
    deadline = time.monotonic() + 200
    while sum(r["status"] == "done" for r in rows(folder)) < 2:
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with held(harvesters_below(first.pid)):  # Tune takes its time
        first.send_signal(signal.SIGINT)
        said = first.communicate(timeout=200)[0]
    before = {r["trial"]: r for r in rows(folder)}
    done = {name for name, r in before.items() if r["status"] == "done"}
    assert len(before) == 4
    assert len(done) == 2, said
    again = start(config, tmp_path)
    said = again.communicate(timeout=300)[0]
    assert "RESULT 128" in said, said
    after = {r["trial"]: r for r in rows(folder)}
    assert after.keys() == before.keys()
    assert yaml.safe_load((folder / "sweep.yaml").read_text())["saes"].keys() == before.keys()
    for name, row in after.items():
        assert row["status"] == "done"
        assert int(float(row["n_training_tokens"])) == (SHORT if name in done else LONG)
        assert load_sae(str(folder / row["path"])).d_in == 128
        if name in done:
            assert row == before[name]
