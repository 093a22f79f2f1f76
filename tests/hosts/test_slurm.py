"""examples/slurm.sbatch: what it asks of Slurm and Ray, and the same on two hosts without Slurm."""

import csv
import os
import shlex
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner
from ray.scripts.scripts import start
from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run
from support import hosts
from support.bundled import ROOT
from support.hosts import wait_for
from support.running import config

from saeray.client.cli import parser

SCRIPT = ROOT / "examples" / "slurm.sbatch"
OF_SLURM = {
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CPUS_PER_TASK": "2",
    "SLURM_JOB_ID": "1",
}
# What Slurm's commands do in one place: the address of the first node, and the task itself there.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
if [ "$1" = hostname ]; then echo ADDRESS; exit; fi
printf '%q ' "$@" > ~/task.part && mv ~/task.part ~/task
exec "$@"
"""
SCONTROL = "#!/bin/bash\nprintf 'node1\\nnode2\\n'\n"


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def slurm_at(folder, address):
    executable(folder / "srun", SRUN.replace("ADDRESS", address))
    executable(folder / "scontrol", SCONTROL)


@pytest.fixture
def task(tmp_path):
    """A function that runs the script, without Ray, and gives what each node would be told."""
    slurm_at(tmp_path / "bin", "10.0.0.1")
    for name in ("ray", "saeray"):
        executable(tmp_path / "bin" / name, "#!/bin/bash\n")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").touch()
    env = dict(OF_SLURM, HOME=str(tmp_path), SAERAY_VENV=str(tmp_path / "venv"))
    env["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(*arguments):
        subprocess.run(["bash", SCRIPT, *arguments], cwd=tmp_path, env=env, check=True, timeout=60)
        return shlex.split((tmp_path / "task").read_text())

    return run


def test_every_node_is_told_what_ray_and_saeray_take(task, tmp_path):
    program, command, *ours = task("my sweep.yaml", "mine")
    assert (program, command) == ("ray", "symmetric-run")
    rays, entrypoint = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    known = symmetric_run.make_context("_", list(rays), resilient_parsing=True).params
    assert (known["address"], known["min_nodes"]) == ("10.0.0.1:6379", 2)
    for_start = curate_and_validate_ray_start_args(rays)
    assert start.make_context("start", ["--head", *for_start]).params["num_cpus"] == 2

    assert entrypoint[0] == "saeray"
    parsed = parser().parse_args(entrypoint[1:])
    assert (parsed.file, parsed.name, parsed.address) == ("my sweep.yaml", "mine", "auto")
    assert parsed.storage_path == str(tmp_path / "results")


def test_the_same_job_again_goes_on(task, tmp_path):
    (tmp_path / "results" / "mine").mkdir(parents=True)
    (tmp_path / "results" / "mine" / "sweep.yaml").touch()
    told = task("my_sweep.yaml", "mine")
    parsed = parser().parse_args(told[told.index("saeray") + 1 :])
    assert (parsed.file, parsed.resume) == (None, str(tmp_path / "results" / "mine"))


def test_it_says_what_it_is_called_with(tmp_path):
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "FILE.yaml NAME" in done.stderr


def test_ray_has_the_command():
    said = CliRunner().invoke(symmetric_run, ["--help"]).output
    assert "--min-nodes" in said and "--address" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(hosts.missing()), reason=str(hosts.missing()))
def test_a_sweep_on_two_nodes():
    """Each node is a host of its own; a file is how `srun` reaches the second one."""
    with hosts.hosts("node1", "node2") as made:
        first, second = made.values()
        bundled = "saeray:models/tiny-python"
        data = config() | dict(model_name=bundled, dataset_path=f"{bundled}/text/train.parquet")
        first.path("~/mine.yaml").write_text(yaml.safe_dump(data))
        slurm_at(first.path("~/bin"), first.ip)
        env = OF_SLURM | {
            "PATH": f"{hosts.HOME}/bin:{sys.prefix}/bin:{hosts.SYSTEM_PATH}",
            "PYTHONPATH": ROOT,
            "SAERAY_VENV": sys.prefix,
        }
        job = first.popen(f"bash {SCRIPT} mine.yaml mine > said 2>&1", env=env)
        wait_for(first.path("~/task").exists, "the task of the nodes")
        token = first.path("~/.ray/auth_token").read_text()
        second.path("~/.ray").mkdir(exist_ok=True)  # the home of a Slurm cluster is a shared one
        second.path("~/.ray/auth_token").write_text(token)
        told = first.path("~/task").read_text()
        other = second.popen(
            f"RAY_AUTH_MODE=token RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600 {told} > said 2>&1",
            env=env,
        )
        said = first.path("~/said")
        code = job.wait(timeout=400)
        assert code == 0, said.read_text()
        # Its Ray gives the head up after a minute.
        assert other.wait(timeout=180) == 0, second.path("~/said").read_text()
        with first.path("~/results/mine/results.csv").open() as file:
            assert [row["status"] for row in csv.DictReader(file)] == ["done", "done"]
        for host in made.values():  # Ray is stopped on both
            wait_for(lambda host=host: not host.ray_processes(), "the end of Ray")
