"""A cluster that has only a head: Ray's own autoscaler is asked for nodes, and says which."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.running import Ended, assert_same, config

import saeray
from saeray.errors import ConfigError

pytestmark = pytest.mark.slow

PORT = 20901
HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"  # as the provider has them

# Ray's provider for trying the autoscaler out: its nodes are processes on this machine.
CLUSTER = {
    "cluster_name": "fake",
    "max_workers": 3,
    "idle_timeout_minutes": 5,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "head_node_id": HEAD_ID,
        "gcs_address": f"127.0.0.1:{PORT}",
    },
    "head_node_type": HEAD_TYPE,
    "available_node_types": {
        HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "harvesting": {
            "resources": {"CPU": 1, "harvester": 1, "object_store_memory": 200_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
        },
        "training": {
            "resources": {"CPU": 2, "trainer": 1, "object_store_memory": 200_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 2,
        },
    },
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    file = tmp_path_factory.mktemp("cluster") / "cluster.yaml"
    file.write_text(json.dumps(CLUSTER))
    process = subprocess.Popen(
        [
            os.path.join(os.path.dirname(sys.executable), "ray"), "start", "--head", "--block",
            f"--port={PORT}", "--num-cpus=0", "--object-store-memory=200000000",
            "--include-dashboard=false", "--disable-usage-stats",
            "--ray-client-server-port=20902", f"--autoscaling-config={file}",
        ],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        | {
            "RAY_FAKE_CLUSTER": "1",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_enable_autoscaler_v2": "0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    for line in process.stdout:
        if "--block" in line:
            break
    else:
        pytest.fail("ray start ended early")
    yield f"127.0.0.1:{PORT}"
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=60)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # the nodes the autoscaler started
        except ProcessLookupError:
            pass


def test_nodes_are_asked_for_and_what_is_waited_for_is_shown(
    address, undisturbed, tmp_path, capsys
):
    roles = dict(
        harvester_resources={"harvester": 1}, trainer_resources={"trainer": 1}, trainer_cpus=2
    )
    started = time.monotonic()
    result = saeray.sweep(
        config() | dict(resources=roles), name="grown", storage_path=tmp_path, address=address
    )
    said = capsys.readouterr().err
    assert "waiting for 1 x harvesting, 1 x training" in said
    assert "0.5 CPUs, 1 harvester" in said
    assert_same(Ended(tmp_path, "grown"), undisturbed)
    assert result.ok
    with capsys.disabled():
        print(f"\nfrom no node to a finished sweep: {time.monotonic() - started:.0f} s")


def test_what_no_node_could_ever_have_is_refused_with_the_numbers(address, tmp_path):
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"the autoscaler can add") as error:
        saeray.sweep(
            config() | dict(resources=dict(trainer_resources={"trainer": 1}, trainer_cpus=3)),
            name="never", storage_path=tmp_path, address=address, live=False,
        )  # fmt: skip
    assert "1 trainer of 3 CPUs, 1 trainer" in str(error.value)
    assert time.monotonic() - started < 60
