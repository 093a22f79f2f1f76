"""The cluster files are such that `ray up` takes them, and AWS is asked for what cluster.yaml says.

AWS is moto's server on loopback. Nothing leaves this machine: boto3 knows no other endpoint, and
`ray up`, which would go on by SSH to the addresses that moto makes up, has no ssh on its PATH.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.bundled import ROOT

from saeray.spec.resources import Resources

FILES = ("cluster.yaml", "cluster-local.yaml")
LIMIT_S = 240  # takes about 6 s on an idle machine
SECRETS = (
    r"AKIA[0-9A-Z]{16}",  # AWS
    r"hf_[A-Za-z0-9]{20}",  # the Hugging Face hub
    r"\b[0-9a-f]{32,}\b",  # wandb, Ray's token
    r"PRIVATE KEY",
    r"(?i)(secret|api_key|password|token)\w*\s*[:=]\s*[\"']?\w{12}",
)


def text_of(name):
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    return path.read_text(encoding="utf-8")


def comments(text):
    """What stands in comments, without their `# `."""
    return "\n".join(re.sub("^# ?", "", s) for s in text.splitlines() if s.startswith("#"))


def suggested(text):
    """The `resources:` that the comments of cluster.yaml suggest for a sweep file."""
    block = re.search(r"^  resources:\n(?:    .*\n)+", comments(text), re.M)
    return Resources(**yaml.safe_load(block[0])["resources"])


# --- what stands in the files -----------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_ray_up_takes_the_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(text_of(name))))


@pytest.mark.parametrize("name", FILES)
def test_nobody_without_the_token_gets_in(name):
    config = yaml.safe_load(text_of(name))
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for role in ("head", "worker"):
        starts = [c for c in config[f"{role}_start_ray_commands"] if "ray start" in c]
        assert len(starts) == 1
        before, options = starts[0].split("ray start")
        assert "export RAY_AUTH_MODE=token;" in before
        if role == "head":
            assert "--dashboard-host=127.0.0.1" in options.split()
            assert "export GRPC_ENABLE_FORK_SUPPORT=0;" in before  # see connect.start_ray


@pytest.mark.parametrize("name", FILES)
def test_no_secret_stands_in_the_file(name):
    text = text_of(name)
    assert [found[0] for pattern in SECRETS for found in re.finditer(pattern, text)] == []
    assert "aws_credentials" not in yaml.safe_load(text)["provider"]


def test_gpu_nodes_start_from_none():
    types = yaml.safe_load(text_of("cluster.yaml"))["available_node_types"]
    assert {name: kind.get("min_workers", 0) for name, kind in types.items()} == {
        "head": 0,
        "harvester": 0,
        "trainer": 0,
    }


# --- what AWS is asked for --------------------------------------------------------------------


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    """An AWS account on loopback with the role that the comments describe, and a home to use it."""
    import boto3
    from moto.server import ThreadedMotoServer
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache

    text = text_of("cluster.yaml")
    home = tmp_path_factory.mktemp("home")
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("a token")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    env = {
        "HOME": str(home),
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key in [k for k in os.environ if k.startswith("AWS_")]:
            patch.delenv(key)
        for key, value in env.items():
            patch.setenv(key, value)
        patch.chdir(ROOT)  # the paths in file_mounts are relative
        iam = boto3.client("iam", region_name="us-west-2")
        said = dict(re.findall(r"--([a-z-]*policy)-document '(.*?)'", comments(text), re.S))
        role = dict(RoleName="saeray-node")
        profile = dict(InstanceProfileName="saeray-node")
        iam.create_role(**role, AssumeRolePolicyDocument=said["assume-role-policy"])
        iam.put_role_policy(**role, PolicyName="saeray-node", PolicyDocument=said["policy"])
        iam.create_instance_profile(**profile)
        iam.add_role_to_instance_profile(**profile, **role)
        yield env
    server.stop()
    for cache in (client_cache, resource_cache):  # Ray's, of clients of this server
        cache.cache_clear()


def instances(**tags):
    """The instances AWS has that bear these tags."""
    import boto3

    filters = [{"Name": f"tag:{k.replace('_', '-')}", "Values": [v]} for k, v in tags.items()]
    ec2 = boto3.client("ec2", region_name="us-west-2")
    found = ec2.describe_instances(Filters=filters)["Reservations"]
    return [
        i | {"Tags": {t["Key"]: t["Value"] for t in i["Tags"]}}
        for reservation in found
        for i in reservation["Instances"]
    ]


@pytest.fixture(scope="module")
def heads(aws, tmp_path_factory):
    """The heads that AWS has once `ray up` has come to wait for a head's SSH server."""
    folder = tmp_path_factory.mktemp("up")
    log = folder / "log"
    with log.open("w") as out:
        up = subprocess.Popen(
            [
                Path(sys.executable).with_name("ray"),
                "up",
                "-y",
                "--no-config-cache",
                "cluster.yaml",
            ],
            cwd=ROOT,
            env=aws | {"PATH": str(folder), "TMPDIR": str(folder)},  # no ssh is there
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + LIMIT_S
        while not instances(ray_node_type="head", ray_node_status="waiting-for-ssh"):
            assert up.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
    finally:
        if up.poll() is None:
            os.killpg(up.pid, signal.SIGKILL)
        up.wait()
    return instances(ray_node_type="head")


def test_ray_up_starts_one_head_without_a_gpu(heads):
    import boto3

    (head,) = heads
    assert head["InstanceType"] == "m5.2xlarge"
    assert "InstanceLifecycle" not in head
    assert head["Tags"] | {"ray-launch-config": "…"} == {
        "Name": "ray-saeray-head",
        "ray-cluster-name": "saeray",
        "ray-node-type": "head",
        "ray-user-node-type": "head",
        "ray-node-status": "waiting-for-ssh",
        "ray-launch-config": "…",
    }
    assert head["IamInstanceProfile"]["Arn"].endswith(":instance-profile/saeray-node")
    (group,) = head["SecurityGroups"]
    ec2 = boto3.client("ec2", region_name="us-west-2")
    (rules,) = ec2.describe_security_groups(GroupIds=[group["GroupId"]])["SecurityGroups"]
    open_to_all = [r for r in rules["IpPermissions"] if r["IpRanges"]]
    assert [(r["FromPort"], r["ToPort"]) for r in open_to_all] == [(22, 22)]


@pytest.fixture(scope="module")
def on_head(heads):
    """The config that `ray up` puts on the head for the autoscaler, as that reads it, and AWS."""
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.providers import _get_node_provider
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    config = yaml.safe_load(text_of("cluster.yaml"))
    config = commands._bootstrap_config(config, no_config_cache=True)
    provider = _get_node_provider(config["provider"], config["cluster_name"], use_cache=False)
    config, file = commands._set_up_config_for_head_node(config, provider, no_restart=False)
    with file:
        read = json.loads(Path(file.name).read_text())
    key = "~/ray_bootstrap_key.pem"  # goes to the head's home, for which ours stands here
    shutil.copy(config["file_mounts"][key], Path(key).expanduser())
    return AutoscalingConfig(read, skip_content_hash=True), provider


def launches(config, harvesters, packs, by="resources"):
    """Which nodes Ray's autoscaler would start for so many harvesters and packs of one rank.

    The harvesters are actors, and a pack is a placement group.
    """
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import GangResourceRequest
    from ray.core.generated.common_pb2 import LabelSelectorOperator

    def request(cpus, gpus, resources, labels):
        among = LabelSelectorOperator.LABEL_OPERATOR_IN
        selector = [(key, among, [value]) for key, value in labels.items()]
        bundle = {"CPU": cpus, "GPU": gpus, **resources}
        return ResourceRequestUtil.make(bundle, label_selectors=[selector] if selector else None)

    text = text_of("cluster.yaml")
    wanted = suggested(text)
    if by == "resources":
        of_harvester, of_trainer = wanted.harvester_resources, wanted.trainer_resources
        assert of_harvester and of_trainer
        ways = ((of_harvester, {}), (of_trainer, {}))
    else:
        said = dict(re.findall(r"(harvester|trainer)_labels: (\{.*?\})", comments(text)))
        ways = (({}, yaml.safe_load(said["harvester"])), ({}, yaml.safe_load(said["trainer"])))
    harvester = request(wanted.harvester_cpus, wanted.harvester_gpus, *ways[0])
    trainer = request(1, wanted.trainer_gpus, *ways[1])
    scheduler = ResourceDemandScheduler()
    reply = scheduler.schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([harvester] * harvesters),
            gang_resource_requests=[GangResourceRequest(requests=[trainer])] * packs,
        )
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch}


@pytest.mark.parametrize("by", ["resources", "labels"])
def test_harvesters_and_trainers_get_nodes_of_their_own(on_head, by):
    config, _ = on_head
    assert launches(config, 2, 2, by) == {"harvester": 2, "trainer": 2}
    assert launches(config, 2, 0, by) == {"harvester": 2}
    assert launches(config, 0, 1, by) == {"trainer": 1}


def test_never_more_nodes_than_max_workers(on_head):
    config, _ = on_head
    assert launches(config, 50, 50) == {"harvester": 2, "trainer": 4}


def test_the_head_gives_its_cpus_to_nobody(on_head):
    config, _ = on_head
    assert config.get_node_resources("head") == {"CPU": 0}


def test_harvesters_are_spot_and_trainers_are_not(on_head):
    from ray.autoscaler.v2.instance_manager.node_provider import NodeProviderAdapter

    config, provider = on_head

    class Reader:
        def get_cached_autoscaling_config(self):
            return config

    # One by one: Ray asks for at least one and at most n, of which moto gives one.
    adapter = NodeProviderAdapter(provider, Reader(), max_launch_batch_per_type=1)
    shape = launches(config, 2, 2)
    assert sum(shape.values()) == 4
    adapter.launch(shape, "a request")
    deadline = time.monotonic() + LIMIT_S
    while len(started := instances(ray_node_type="worker")) < 4:
        assert adapter.poll_errors() == []
        assert time.monotonic() < deadline, started
        time.sleep(0.1)
    assert sorted(
        (i["Tags"]["ray-user-node-type"], i["InstanceType"], i.get("InstanceLifecycle"))
        for i in started
    ) == [
        ("harvester", "g5.xlarge", "spot"),
        ("harvester", "g5.xlarge", "spot"),
        ("trainer", "g5.2xlarge", None),
        ("trainer", "g5.2xlarge", None),
    ]
    everybody = instances(ray_cluster_name="saeray")
    assert len(everybody) == 5
    # Between zones every GB of activations would cost, and without the profile none reaches S3.
    assert {i["Placement"]["AvailabilityZone"] for i in everybody} == {"us-west-2a"}
    assert {i["IamInstanceProfile"]["Arn"].split("/")[-1] for i in everybody} == {"saeray-node"}
    assert len({i["ImageId"] for i in everybody}) == 1
