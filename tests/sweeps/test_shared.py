"""Several sweeps on one cluster at once: they share an LM pass where they want to, and no more."""

import asyncio
import json
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster
from support.running import Ended, config, held, pids

from saeray.client.connect import all_ended, connected
from saeray.client.status import look
from saeray.cluster.registry import read_all
from saeray.stream.launch import held_by_buffers

pytestmark = pytest.mark.slow

OURS = (
    "Roster", "Harvester", "ActivationBuffer", "TokenServer", "Launcher", "RayTrainWorker",
    "SAETrial",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        made = Cluster(
            initialize_head=True,
            head_node_args=dict(
                num_cpus=0, object_store_memory=200_000_000, include_dashboard=False
            ),
        )
        made.add_node(num_cpus=8, object_store_memory=300_000_000)
        yield made
        with all_ended(made.list_all_nodes()):
            made.shutdown()


def command(cluster, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "saeray", *map(str, arguments), "--address", cluster.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process, code=0):
    text = process.communicate(timeout=240)[0]
    assert process.returncode == code, text
    return text


class Sweep(Ended):
    """One SAE of `config()`, by the command line."""

    def __init__(self, cluster, folder, name, lr, namespace):
        super().__init__(folder, name)
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}.yaml"
        one = dict(lr=[lr], share_stream=True, resources=dict(harvesters=1, trainer_cpus=1))
        file.write_text(yaml.safe_dump(config() | one))
        self.process = command(
            cluster, "sweep", file, "--name", name, "--storage-path", folder,
            "--namespace", namespace,
        )  # fmt: skip

    def wait_for(self, steps, limit=180.0):
        deadline = time.monotonic() + limit
        while self.steps() < steps:
            assert self.process.poll() is None, self.process.stdout.read()
            assert time.monotonic() < deadline, f"stands at {self.steps()} steps"
            time.sleep(0.05)


def alive(kind):
    """How many actors of a class live."""
    from ray._private.state import actors

    kinds = [a["ActorClassName"] for a in actors().values() if a["State"] == "ALIVE"]
    return sum(k.split(".")[-1] == kind for k in kinds)


def wait_for(condition, what, limit=120.0):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def phase(namespace, name):
    """What the roster of a sweep that runs says it is at."""
    (record,) = [r for r in read_all() if (r.namespace, r.name) == (namespace, name)]
    status = look(record)
    return None if status is None else status.phase


def harvested(text):
    """LM tokens, as a sweep's summary says."""
    return int(text.split("LM tokens harvested: ")[1].split(";")[0].replace(",", ""))


def assert_like(mine, undisturbed):
    """Weights and log of the one SAE are those of a sweep that shared nothing."""
    weights, logs = undisturbed.weights(), undisturbed.logs()
    for trial, theirs in mine.weights().items():
        assert theirs == weights[trial]
        assert mine.logs()[trial] == logs[trial]
    assert len(mine.weights()) == 1


def test_two_sweeps_share_a_stream_and_clean_up_separately(cluster, undisturbed, tmp_path):
    with connected(cluster.address), ExitStack() as others_held:
        # Each is held as soon as it trains, or it might have ended before the next one does.
        a = Sweep(cluster, tmp_path, "a", 1e-3, "team")
        a.wait_for(20)
        of_team = pids("Harvester")
        with held(of_team):
            same_name = Sweep(cluster, tmp_path / "other", "a", 1e-3, "other-team")
            same_name.wait_for(20)
            others_held.enter_context(held(pids("Harvester") - of_team))
            b = Sweep(cluster, tmp_path, "b", 3e-3, "team")
            wait_for(lambda: alive("RayTrainWorker") == 3, "the trainer of b")
            assert alive("Roster") == 3
            assert alive("Harvester") == alive("ActivationBuffer") == 2  # one a namespace

            # 3 half buffers of 4 blocks of 16 * 64 rows of 128 floats for each of the two streams,
            # on the node that harvests.
            in_store = asyncio.run(held_by_buffers())
            assert list(in_store.values()) == [2 * 12 * 16 * 64 * 128 * 4]
            (node,) = in_store
            assert node in {n["NodeID"] for n in ray.nodes() if n["Resources"].get("CPU")}

            # A name that is in two namespaces is asked back for; its full name is not.
            assert "which of them?" in said(command(cluster, "stop", "a"), 2)
        b.wait_for(20)
        with held(of_team):
            stopped = command(cluster, "stop", "team/b")
            wait_for(lambda: phase("team", "b") == "stopping", "the word to stop")
        wait_for(lambda: [r["status"] for r in b.rows] == ["interrupted"], "the end of b")
        with held(of_team):
            assert "is stopped" in said(stopped)
            said(b.process, 1)
            assert alive("Harvester") == 2  # `a` still reads
        others_held.close()

        listed = json.loads(said(command(cluster, "status", "--json")))
        states = {(s["namespace"], s["name"]): s["state"] for s in listed}
        assert states[("team", "b")] == "interrupted"
        assert states[("team", "a")] in ("running", "done")

        # What the shared buffer harvested while `a` was there: one pass and a little, not two.
        assert harvested(said(a.process)) < 1.5 * 245_760
        said(same_name.process)
        assert_like(a, undisturbed)
        assert_like(same_name, undisturbed)

        resumed = command(cluster, "sweep", "--resume", b.folder / "b", "--namespace", "team")
        said(resumed)
        assert_like(b, undisturbed)

        deadline = time.monotonic() + 60
        while left := [kind for kind in OURS if alive(kind)]:
            assert time.monotonic() < deadline, left
            time.sleep(0.5)


def test_one_pass_serves_both(cluster, undisturbed, tmp_path):
    """Those that begin together read the same blocks: one pass, not two."""
    with connected(cluster.address):
        sweeps = [
            Sweep(cluster, tmp_path, name, lr, "both") for name, lr in (("c", 1e-3), ("d", 3e-3))
        ]
        sweeps[0].wait_for(20)
        texts = [said(sweep.process) for sweep in sweeps]
        for sweep in sweeps:
            assert_like(sweep, undisturbed)
    # Each counts what the shared buffer harvested while it was there; 245,760 is one pass.
    counts = [harvested(text) for text in texts]
    assert max(counts) < 1.5 * 245_760, counts
