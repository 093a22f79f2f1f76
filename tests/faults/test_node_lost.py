"""A node is lost with the blocks, the harvester and the trainer it held: without grace, or told."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from support.running import QUICK_HEALTH_CHECKS, Running, assert_same, held, pids

from saeray.client.connect import all_ended, start_ray


def nodes_of(kind):
    from ray._private.state import actors

    return {
        a["Address"]["NodeID"]
        for a in actors().values()
        if a["ActorClassName"].split(".")[-1] == kind and a["State"] == "ALIVE"
    }


def node_of(kind):
    (node,) = nodes_of(kind)
    return node


def wait_until(condition, limit=90.0):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def take_away(address, node, seconds):
    """The notice that a spot machine's node gives, by Ray's own command."""
    subprocess.run(
        [
            str(Path(sys.executable).with_name("ray")), "drain-node",
            "--address", address, "--node-id", node.node_id,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", str(seconds),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    """A head with no CPU to give, and nodes to add to it."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args=dict(
            num_cpus=0,
            object_store_memory=200_000_000,
            include_dashboard=False,
            _system_config=dict(QUICK_HEALTH_CHECKS),
        ),
    )
    assert start_ray(cluster.address)
    yield cluster
    with all_ended(cluster.list_all_nodes()):
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.ci
def test_a_node_is_lost_with_blocks_harvester_and_trainer(cluster, undisturbed, tmp_path, capsys):
    first = cluster.add_node(num_cpus=2, object_store_memory=200_000_000)
    running = Running(tmp_path, "lost")
    running.wait_for(40)
    with held(pids("Harvester")):
        assert node_of("Harvester") == node_of("RayTrainWorker") == first.node_id
        assert node_of("ActivationBuffer") == node_of("Roster") == cluster.head_node.node_id
        cluster.add_node(num_cpus=2, object_store_memory=200_000_000)
    reached, killed = running.steps(), time.monotonic()
    cluster.remove_node(first, allow_graceful=False)
    while any(n["Alive"] and n["NodeID"] == first.node_id for n in ray.nodes()):
        time.sleep(0.1)
    noticed = time.monotonic() - killed
    running.wait_for(reached + 30)
    with capsys.disabled():
        print(
            f"\nnode lost at {reached} steps: Ray notices after {noticed:.1f} s, 30 more steps "
            f"after {time.monotonic() - killed:.1f} s"
        )
    running.end()
    assert_same(running, undisturbed)
    for node in cluster.list_all_nodes()[1:]:  # what the next test begins with
        cluster.remove_node(node)


def saved_and_logged(running):
    """By SAE, the steps of its newest checkpoint (0: none) and of its last log line."""
    found = {}
    for trial in (running.folder / running.name / "trials").iterdir():
        saved = [int(c.parent.name) for c in trial.glob("checkpoints/*/train_state.json")]
        lines = (trial / "metrics.jsonl").read_text().splitlines()
        found[trial.name] = (max(saved, default=0) // 1024, json.loads(lines[-1])["step"])
    return found


@pytest.mark.slow
def test_a_node_that_is_to_be_taken_away_is_left_in_time(cluster, undisturbed, tmp_path, capsys):
    first = cluster.add_node(num_cpus=2, object_store_memory=200_000_000)
    running = Running(tmp_path, "told", checkpoint_every_s=None)  # no checkpoint but for the notice
    running.wait_for(40)
    with held(pids("Harvester")):
        assert node_of("Harvester") == node_of("RayTrainWorker") == first.node_id
        second = cluster.add_node(num_cpus=2, object_store_memory=200_000_000)
        take_away(cluster.address, first, 600)
    told = time.monotonic()
    wait_until(lambda: nodes_of("RayTrainWorker") != {first.node_id})
    moved = saved_and_logged(running)
    assert all(0 < logged - 5 <= saved for saved, logged in moved.values()), moved  # a log interval
    wait_until(lambda: nodes_of("RayTrainWorker") == nodes_of("Harvester") == {second.node_id})
    with capsys.disabled():
        print(f"\nsaved, logged: {moved}; elsewhere {time.monotonic() - told:.1f} s after notice")
    # Ray ends a node that is drained as soon as nothing runs there: long before the notice is over.
    wait_until(lambda: not any(n["Alive"] and n["NodeID"] == first.node_id for n in ray.nodes()))
    result = running.end()
    assert_same(running, undisturbed)
    said = " ".join(result.status.warnings)
    assert "leaves its node, which is about to be taken away" in said
    assert "is saved and leaves its node" in said
