"""Processes of a running sweep are killed with SIGKILL; it must end with the same files."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import ray
import yaml
from conftest import HOOK, MODEL

import saeray
from saeray.runner import SweepResult
from saeray.storage import Folder
from saeray.sweep_folder import SweepFolder

pytestmark = pytest.mark.usefixtures("ray_instance")

STEPS = 240
VICTIMS = ["Harvester", "TokenServer", "ActivationBuffer", "SAETrial", "Roster", "RayTrainWorker"]


def config():
    return dict(
        model_name=str(MODEL),
        hook_point=HOOK,
        dataset_path=str(MODEL / "text" / "train.parquet"),
        context_size=64,
        expansion_factor=8,
        lr=[1e-3, 3e-3],
        l1_coefficient=1e-3,
        lr_warm_up_steps=20,
        training_tokens=STEPS * 1024,
        train_batch_size=1024,
        store_batch_size=16,
        n_batches_in_buffer=8,
        b_dec_init_rows=512,
        eval_windows=8,
        eval_every=60,
        wandb_log_frequency=5,
        checkpoint_every_s=1.0,
        use_ghost_grads=True,
        dead_feature_window=30,
        log_to_wandb=False,
        device="cpu",
        seed=7,
    )


def pids(kind):
    """Of the living actors of a class."""
    from ray._private.state import actors

    return {
        int(a["Pid"])
        for a in actors().values()
        if a["ActorClassName"].split(".")[-1] == kind and a["State"] == "ALIVE"
    }


class Running:
    """A sweep in a thread of its own, and how far it is."""

    def __init__(self, folder, name, **changes):
        self.folder, self.name = folder, name
        self.result = self.error = None
        self.looks = []  # (when, steps of all SAEs together)
        self.config = config() | changes
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            self.result = saeray.sweep(
                self.config, name=self.name, storage_path=self.folder, live=False
            )
        except BaseException as error:
            self.error = error

    def steps(self):
        """Steps of all SAEs, as their logs say."""
        total = 0
        for log in (self.folder / self.name / "trials").glob("*/metrics.jsonl"):
            total += log.read_text().count("\n") * 5
        self.looks.append((time.monotonic(), total))
        return total

    def wait_for(self, steps, limit=120.0):
        deadline = time.monotonic() + limit
        while self.steps() < steps:
            assert self.thread.is_alive(), self.error or "it ended before it was killed"
            assert time.monotonic() < deadline, f"stands at {self.steps()} steps"
            time.sleep(0.05)
        return self.steps()

    def end(self, limit=200.0):
        self.thread.join(timeout=limit)
        assert not self.thread.is_alive(), f"stands at {self.steps()} steps"
        if self.error is not None:
            raise self.error
        return self.result

    def logs(self):
        """Every line of every metrics.jsonl, without what depends on the clock."""
        return {
            log.parent.name: [
                {k: v for k, v in json.loads(line).items() if k != "details/training_seconds"}
                for line in log.read_text().splitlines()
            ]
            for log in (self.folder / self.name / "trials").glob("*/metrics.jsonl")
        }

    def weights(self):
        return {
            trial.parent.name: Folder.at(str(trial)).read("sae_weights.safetensors")
            for trial in (self.folder / self.name / "trials").glob("*/final")
        }


@pytest.fixture(scope="module")
def undisturbed(ray_instance, tmp_path_factory):
    running = Running(tmp_path_factory.mktemp("kills"), "undisturbed")
    result = running.end()
    assert result.ok
    return running


def kill(kind):
    (victim, *_) = pids(kind)
    os.kill(victim, signal.SIGKILL)
    return victim


def assert_same(running, undisturbed):
    """Byte for byte the same weights, and the same log but for its times."""
    assert running.weights() == undisturbed.weights()
    assert running.logs() == undisturbed.logs()
    assert [r["status"] for r in running.result.rows] == ["done", "done"]
    figures = ("ce_loss_score", "l0", "explained_variance", "n_training_tokens")
    for mine, theirs in zip(running.result.rows, undisturbed.result.rows, strict=True):
        assert [mine[f] for f in figures] == [theirs[f] for f in figures]


def test_every_kind_of_process_is_killed_in_one_sweep(undisturbed, tmp_path, capsys):
    running = Running(tmp_path, "killed")
    reached = running.wait_for(40)
    pauses = {}
    for kind in ["Harvester", *VICTIMS]:  # a harvester twice in a row
        killed = time.monotonic()
        kill(kind)
        reached = running.wait_for(reached + 30)
        pauses.setdefault(kind, []).append(time.monotonic() - killed)
    result = running.end()
    with capsys.disabled():
        print("\nseconds from a kill to 30 more SAE-steps:", {
            kind: [round(s, 1) for s in seconds] for kind, seconds in pauses.items()
        })  # fmt: skip
    assert_same(running, undisturbed)
    warnings = " ".join(result.status.warnings)
    assert "harvester 0 died" in warnings
    assert "roster died" in warnings


def test_nothing_is_left_of_all_this(undisturbed, ray_instance):
    from ray._private.state import actors

    rays_own = {"_AutoscalingCoordinatorActor"}  # one per cluster, since the first TorchTrainer
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        alive = {a["ActorClassName"] for a in actors().values() if a["State"] != "DEAD"}
        groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
        free = ray.available_resources().get("CPU"), ray.cluster_resources().get("CPU")
        if alive <= rays_own and not groups and free[0] == free[1]:
            return
        time.sleep(0.5)
    pytest.fail(f"left: {alive}, {groups}, {free[0]} of {free[1]} CPUs free")


def command(*arguments):
    """The command line, in a process of its own with a Ray of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "saeray.cli", "sweep", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_ctrl_c_then_a_killed_driver_then_a_damaged_checkpoint(undisturbed, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config() | dict(n_checkpoints=8, checkpoint_every_s=None)))
    running = Running.__new__(Running)
    running.folder, running.name, running.looks = tmp_path, "resumed", []
    folder = tmp_path / "resumed"

    def wait_for(steps, process):
        deadline = time.monotonic() + 120
        while running.steps() < steps:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    process = command(file, "--name", "resumed", "--storage-path", tmp_path)
    wait_for(80, process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=100)[0]
    assert process.returncode == 130, said
    assert "--resume" in said
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [r["status"] for r in rows] == ["interrupted"] * 2
    assert not (folder / ".ray").exists()

    process = command("--resume", folder)
    wait_for(200, process)
    process.kill()
    process.wait()

    # Ctrl-C has left one at its step, n_checkpoints others at every 30th.
    for trial in (folder / "trials").iterdir():
        saved = sorted(int(p.name) for p in (trial / "checkpoints").iterdir())
        assert 60 * 1024 in saved
    newest = trial / "checkpoints" / str(saved[-1]) / "train_state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])

    process = command("--resume", folder)
    said = process.communicate(timeout=150)[0]
    assert process.returncode == 0, said
    assert "checkpoint passed over" in said
    running.result = SweepResult(
        "resumed", Folder.at(folder), SweepFolder(Folder.at(folder), "resumed").read_rows(), None
    )
    assert_same(running, undisturbed)

    # Nothing is left to do, and nothing is done.
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    again = saeray.resume(folder)
    assert again.ok
    assert [r["status"] for r in again.rows] == ["done", "done"]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == stamps


@pytest.mark.slow
@pytest.mark.parametrize("kind", VICTIMS)
def test_one_kill(undisturbed, tmp_path, capsys, kind):
    running = Running(tmp_path, "killed")
    reached = running.wait_for(100)
    killed = time.monotonic()
    kill(kind)
    running.wait_for(reached + 30)
    pause = time.monotonic() - killed
    with capsys.disabled():
        print(f"\n{kind} killed at {reached} steps: 30 more after {pause:.1f} s")
    running.end()
    assert_same(running, undisturbed)
