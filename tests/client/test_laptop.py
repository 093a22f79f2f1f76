"""From a laptop over Ray Client: a sweep is watched, left, killed off, found again, fetched."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray.cluster_utils import Cluster
from support.running import Ended, assert_same, config, harvesters_below, held

import saeray
from saeray.client.connect import all_ended, connected
from saeray.errors import ConfigError

pytestmark = pytest.mark.slow

PORT = 20801


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head that takes clients and has no CPU to give, and a node. Its home is a folder here."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.delenv("RAY_ADDRESS")  # or the head's client server would look for it there
        made = Cluster(
            initialize_head=True,
            head_node_args=dict(
                num_cpus=0,
                object_store_memory=200_000_000,
                include_dashboard=False,
                ray_client_server_port=PORT,
            ),
        )
        made.add_node(num_cpus=2, object_store_memory=200_000_000)
        made.home, made.client = home, f"ray://127.0.0.1:{PORT}"
        yield made
        with all_ended(made.list_all_nodes()):
            made.shutdown()


def command(*arguments, **options):
    """The command line as the laptop has it."""
    return subprocess.Popen(
        [sys.executable, "-m", "saeray", *map(str, arguments)],
        **(dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) | options),
    )


def status(cluster):
    process = command("status", "--json", "--address", cluster.client, stderr=subprocess.PIPE)
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    return {s["name"]: s for s in json.loads(said)}


def wait_for(condition, what, limit=150.0):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def harvest_held(cluster):
    """No block is made meanwhile, so what runs can't end, however long one looks at it."""
    nodes = [n for n in cluster.list_all_nodes() if "raylet" in n.all_processes]
    raylets = [n.all_processes["raylet"][0].process.pid for n in nodes]
    return held(pid for raylet in raylets for pid in harvesters_below(raylet))


@pytest.fixture
def laptop(tmp_path, monkeypatch):
    """A folder to be in, with a sweep file; so many checkpoints slow it down."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config() | dict(checkpoint_every_s=0.01)))
    return tmp_path


# In CI by the command line, between hosts.
def test_a_sweep_from_a_laptop_comes_home_and_is_the_same(cluster, undisturbed, laptop):
    result = saeray.sweep(
        config(), name="away", storage_path="results", address=cluster.client, live=False
    )
    assert result.ok
    assert_same(Ended(laptop / "results", "away"), undisturbed)
    assert (cluster.home / "results" / "away" / "pareto.png").is_file()
    assert not (laptop / "results" / "away" / ".ray").exists()
    assert result.load("lr=0.001").W_dec.shape[1] == 128  # when the cluster is out of reach, too
    with pytest.raises(ConfigError, match="is there already"):
        saeray.sweep(config(), name="away", storage_path="results", address=cluster.client)


@pytest.mark.ci
def test_a_killed_laptop_disturbs_nothing_and_results_are_fetched(cluster, undisturbed, laptop):
    there = Ended(cluster.home / "kept", "killed")
    process = command(
        "sweep", "sweep.yaml", "--name", "killed", "--storage-path", "kept",
        "--address", cluster.client,
    )  # fmt: skip
    wait_for(lambda: there.steps() >= 40, "it did not begin")
    with harvest_held(cluster):
        process.kill()
        process.wait()
        running = status(cluster)["killed"]
    assert (running["state"], running["n_saes"]) == ("running", 2)
    assert 0 < running["progress"] < 1
    wait_for(lambda: status(cluster)["killed"]["state"] == "done", "it did not go on")
    fetched = command("fetch", "killed", "home", "--address", cluster.client)
    said = fetched.communicate(timeout=120)[0]
    assert fetched.returncode == 0, said
    (laptop / "home").rename(laptop / "killed")
    assert_same(Ended(laptop, "killed"), undisturbed)


class Terminal:
    """The command line on a terminal of its own, which answers questions."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        self.process = command(*arguments, stdin=slave, stdout=slave, stderr=slave, text=False)
        os.close(slave)
        os.set_blocking(self.master, False)
        self.text = ""

    def read(self):
        try:
            self.text += os.read(self.master, 65536).decode(errors="replace")
        except (BlockingIOError, OSError):
            pass
        return self.text

    def wait_for(self, words, limit=150.0):
        wait_for(lambda: words in self.read(), f"{words!r} not in {self.text[-2000:]}", limit)

    def ctrl_c(self):
        self.process.send_signal(signal.SIGINT)
        self.wait_for("[s]top it?")

    def end(self, answer):
        os.write(self.master, f"{answer}\n".encode())
        deadline = time.monotonic() + 90
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < deadline, self.text[-2000:]
            time.sleep(0.1)
        self.read()
        return self.process.returncode


@pytest.mark.ci
def test_ctrl_c_leaves_it_running_or_stops_it_as_one_says(cluster, undisturbed, laptop):
    there = Ended(cluster.home / "kept", "asked")
    address = ("--address", cluster.client)
    first = Terminal("sweep", "sweep.yaml", "--name", "asked", "--storage-path", "kept", *address)
    wait_for(lambda: first.read() and there.steps() >= 40, "it did not begin")
    with harvest_held(cluster):
        first.ctrl_c()
        assert first.end("l") == 0, first.text[-2000:]
        assert "asked goes on" in first.text
        reached = there.steps()
    wait_for(lambda: there.steps() > reached + 20, "it did not go on")

    with harvest_held(cluster):
        second = Terminal("sweep", "--resume", "asked", *address)  # joins it
        second.wait_for("training")
        second.ctrl_c()
    assert second.end("s") == 130, second.text[-2000:]  # harvesters evaluate what is stopped
    left = status(cluster)["asked"]
    assert (left["state"], left["n_ended"]) == ("interrupted", 2)
    assert there.steps() < 480

    third = command("sweep", "--resume", "asked", *address)
    said = third.communicate(timeout=200)[0]
    assert third.returncode == 0, said
    assert_same(there, undisturbed)


PROGRAM = """
import sys
import ray
from ray import tune
import saeray

ray.init(sys.argv[1], runtime_env=saeray.runtime_env(), namespace=sys.argv[3])
config = __import__("json").loads(sys.argv[2])
lrs = config.pop("lr")
done = tune.run(
    saeray.SAETrial, name="bare", config=config | {"lr": tune.grid_search(lrs)}, verbose=0
)
for trial in done.trials:
    print("RESULT", trial.last_result["path"], trial.last_result["n_training_tokens"])
"""


# CI does the same between hosts, in test_hosts.
def test_tune_run_over_the_client_needs_no_more_than_the_runtime_env(cluster, undisturbed, laptop):
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, cluster.client, json.dumps(config()), "team-a"],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    lines = [line.split() for line in process.stdout.splitlines() if line.startswith("RESULT")]
    assert [int(n) for _, _, n in lines] == [240 * 1024] * 2
    weights = {(Path(path) / "sae_weights.safetensors").read_bytes() for _, path, _ in lines}
    assert weights == set(undisturbed.weights().values())
    assert status(cluster)["bare"]["namespace"] == "team-a"


@pytest.mark.ci
def test_nothing_is_left_on_the_cluster(cluster):
    import ray
    from ray._private.state import actors

    rays_own = {"_AutoscalingCoordinatorActor"}  # one per cluster, since the first TorchTrainer
    with connected(cluster.address):

        def left():
            alive = {a["ActorClassName"] for a in actors().values() if a["State"] != "DEAD"}
            free = ray.available_resources().get("CPU") == ray.cluster_resources().get("CPU")
            return alive - rays_own, free

        # A driver that was left waits for somebody to look, for two minutes.
        wait_for(lambda: left() == (set(), True), "something is left", 150)


MISMATCH = """
import ray, sys
ray.__version__ = "2.0.0"
from saeray.client.cli import main
sys.exit(main(["status", "--address", sys.argv[1]]))
"""


@pytest.mark.ci
def test_another_version_of_ray_is_told_what_to_set(cluster):
    done = subprocess.run(
        [sys.executable, "-c", MISMATCH, cluster.client], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "Ray 2.0.0" in done.stderr
    assert "install the cluster's versions here" in done.stderr
    assert "Traceback" not in done.stderr
