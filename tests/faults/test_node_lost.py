"""A node is lost without grace, with the blocks, the harvester and the trainer it held."""

import time

import pytest
import ray
from ray.cluster_utils import Cluster
from support.running import QUICK_HEALTH_CHECKS, Running, assert_same, held, pids

from saeray.client.connect import all_ended, start_ray


def node_of(kind):
    from ray._private.state import actors

    (node,) = {
        a["Address"]["NodeID"]
        for a in actors().values()
        if a["ActorClassName"].split(".")[-1] == kind and a["State"] == "ALIVE"
    }
    return node


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
