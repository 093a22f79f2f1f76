"""Processes of a running sweep are killed with SIGKILL; it must end with the same files."""

import csv
import os
import signal
import time

import pytest
import ray
import yaml
from support.bundled import HOOK
from support.running import Ended, Running, assert_same, command, config, held, pids

import saeray

pytestmark = pytest.mark.usefixtures("ray_instance")

VICTIMS = ["Harvester", "TokenServer", "ActivationBuffer", "SAETrial", "Roster", "RayTrainWorker"]


def kill(kind):
    """SIGKILL of one of them. Trials come up while the training goes on: it waits for them."""
    if not pids(kind):
        with held(pids("Harvester")):
            deadline = time.monotonic() + 60
            while not pids(kind):
                assert time.monotonic() < deadline, f"there is no {kind}"
                time.sleep(0.1)
    (victim, *_) = pids(kind)
    os.kill(victim, signal.SIGKILL)
    return victim


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
    assert any(log[-1]["sparsity/resampled"] for log in running.logs().values())
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


@pytest.mark.slow
@pytest.mark.ci
def test_ctrl_c_then_a_killed_driver_then_a_damaged_checkpoint(undisturbed, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config() | dict(n_checkpoints=8, checkpoint_every_s=None)))
    running = Ended(tmp_path, "resumed")
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
    assert "SIGINT: stopping" in said
    assert f"saeray sweep --resume {folder}" in said
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
    assert_same(running, undisturbed)

    # Nothing is left to do, and nothing is done.
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    again = saeray.resume(folder)
    assert again.ok
    assert [r["status"] for r in again.rows] == ["done", "done"]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == stamps


@pytest.mark.slow
def test_the_step_it_is_stopped_at_is_logged_as_if_it_had_gone_on(ray_instance, tmp_path):
    """It is an evaluation, or lies between two lines of the SAE with the longer pace."""
    from saeray.client.status import stop
    from saeray.cluster.registry import read_all

    frequencies, n_steps = [5, 4], 120
    running = Running(
        tmp_path,
        "stopped",
        lr=1e-3,
        wandb_log_frequency=frequencies,
        eval_every=5,
        training_tokens=n_steps * 1024,
    )
    running.wait_for(60)
    (record,) = [r for r in read_all() if r.name == "stopped"]
    stop(record)
    result = running.end()
    assert [row["status"] for row in result.rows] == ["interrupted"] * 2
    stopped_at = int(result.rows[0]["n_training_tokens"]) // 1024
    assert stopped_at < n_steps

    saeray.resume(tmp_path / "stopped")
    steps = range(1, n_steps + 1)
    logs = sorted(running.logs().values(), key=len)
    for every, lines in zip(frequencies, logs, strict=True):
        assert [r["step"] for r in lines] == [s for s in steps if s % 5 == 0 or s % every == 0]
        evaluated = [r["step"] for r in lines if "eval/n_tokens" in r]
        assert evaluated == [s for s in steps if s % 5 == 0]
        assert [r["step"] for r in lines if "eval/mdl" in r] == [n_steps]


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RayTrainWorker", "ActivationBuffer"])
def test_one_kill_of_a_pack_at_two_hook_points(undisturbed, tmp_path, kind):
    """Those that `undisturbed` has too, at one of them, are the same; and it is still one pack."""
    running = Running(tmp_path, "killed", hook_point=[HOOK, "blocks.1.mlp.hook_post"])
    reached = running.wait_for(100)
    kill(kind)
    running.wait_for(reached + 30)
    result = running.end()
    assert [row["status"] for row in result.rows] == ["done"] * 4
    assert [len(pack) for pack in result.status.packs] == [4]
    weights = running.weights()
    for name, theirs in undisturbed.weights().items():
        assert weights[f"hook_point={HOOK},{name}"] == theirs
