"""A cluster made by `ray up` from cluster-local.yaml, used and ended from a laptop beside it.

The laptop, the head and two workers are hosts of their own (see hosts.py): they share nothing but
what `ray up` copies and what goes over the network. All sweeps are the same one as `undisturbed`,
which a single machine has trained, and give its files.
"""

import json
import os
import re
import shlex
import signal
import sys
import time
from contextlib import contextmanager

import pytest
import yaml
from support import hosts
from support.bundled import ROOT
from support.hosts import listens, wait_for
from support.running import DISTURBED, QUICK_HEALTH_CHECKS, Ended, assert_same, config, held

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(hosts.missing()), reason=str(hosts.missing())),
]

# What a shell on the laptop has that uses the cluster, as cluster-local.yaml says at its top.
SHELL = {"RAY_AUTH_MODE": "token", "RAY_UP_enable_autoscaler_v2": 0}
DASHBOARD = 8265
S3_PORT = 5000
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
LABELLED = dict(harvester_labels={"machine": "worker1"}, trainer_labels={"machine": "worker2"})


def changed_for_these_hosts(config, head, workers):
    """cluster-local.yaml with what a user changes in it, and the environment there already."""
    config["provider"] |= {"head_ip": head.ip, "worker_ips": [w.ip for w in workers]}
    config["auth"]["ssh_user"] = "root"
    noticed = " ".join(f"RAY_{name}={value}" for name, value in QUICK_HEALTH_CHECKS.items())
    make_environment, install = config["setup_commands"][:2]
    assert "venv" in make_environment and "pip install" in install
    config["setup_commands"][:2] = [
        f"ln -sfn {shlex.quote(sys.prefix)} ~/saeray/.venv",
        # the checkout that came with file_mounts, not the one this environment was made for
        "grep -qs PYTHONPATH ~/.bashrc || echo 'export PYTHONPATH=$HOME/saeray' >> ~/.bashrc",
        f"echo 'export {noticed}' >> ~/.bashrc",
    ]
    return config


class Cluster:
    """The hosts, and what one does with them from the laptop."""

    def __init__(self, by_name):
        self.hosts = by_name
        self.laptop, self.head, *self.workers = by_name.values()
        self.client = f"ray://{self.head.ip}:10001"

    def up(self):
        self.laptop.checkout("~/saeray")
        for host in (self.head, *self.workers):  # a host has little shared memory
            options = f"--object-store-memory=500000000 --labels=machine={host.name}"
            host.path("~/ray_start_options").write_text(options)
        shipped = yaml.safe_load((ROOT / "cluster-local.yaml").read_text())
        config = changed_for_these_hosts(shipped, self.head, self.workers)
        self.laptop.path("~/cluster.yaml").write_text(yaml.safe_dump(config))
        self.laptop.run("ray get-auth-token --generate > /dev/null")
        self.on_laptop("ray up -y cluster.yaml", timeout=240)

    def on_laptop(self, command, timeout=120.0, **options):
        env = SHELL | options.pop("env", {})
        return self.laptop.run(command, env=env, timeout=timeout, **options).stdout

    def python(self, code, *arguments, timeout=120.0, env=None):
        """The list that a Python program on the laptop prints as JSON at last."""
        self.laptop.path("~/program.py").write_text(code)
        arguments = " ".join(shlex.quote(str(a)) for a in arguments)
        env = {"PYTHONPATH": f"{hosts.HOME}/saeray"} | (env or {})
        said = self.on_laptop(f"python program.py {arguments}", timeout=timeout, env=env)
        # Lines of the cluster's own may come after it.
        return json.loads([line for line in said.splitlines() if line.startswith("[")][-1])

    def saeray(self, command, timeout=120.0, env=None, **options):
        """The laptop's command line, with its checkout of the package."""
        env = {"PYTHONPATH": f"{hosts.HOME}/saeray"} | (env or {})
        return self.on_laptop(f"saeray {command}", timeout=timeout, env=env, **options)

    def start_saeray(self, command):
        env = SHELL | {"PYTHONPATH": f"{hosts.HOME}/saeray"}
        return self.laptop.popen(f"saeray {command} > said 2>&1", env=env)

    def write_sweep(self, path, resources=None, **changes):
        bundled = "saeray:models/tiny-python"
        data = config() | dict(model_name=bundled, dataset_path=f"{bundled}/text/train.parquet")
        data |= dict(resources=resources or {}, storage_path="results") | changes
        self.laptop.path(path).write_text(yaml.safe_dump(data))

    def where(self, kind, n=1):
        """The machines of each class's actors, once there are `n` of this one."""
        self.head.path("~/where.py").write_text(WHERE)
        said = self.head.run("python where.py 2> /dev/null", env={"RAY_AUTH_MODE": "token"}).stdout
        found = json.loads(said.splitlines()[-1])
        return found if len(found.get(kind, [])) >= n else None

    def phases(self):
        """The phase of each sweep that runs."""
        self.head.path("~/phases.py").write_text(PHASES)
        said = self.head.run("python phases.py 2> /dev/null", env={"RAY_AUTH_MODE": "token"}).stdout
        return json.loads(said.splitlines()[-1])

    def harvest_held(self):
        """No block is made meanwhile, so what runs can't end: connecting to look takes seconds."""
        lines = [item for host in self.hosts.values() for item in host.processes().items()]
        return held(pid for pid, line in lines if line.startswith("ray::Harvester"))

    def fetched(self, name, path=None):
        """A sweep's folder on the laptop, under the name that the sweep had."""
        folder = self.laptop.path(f"~/{path or name}")
        assert folder.name == name
        return Ended(folder.parent, name)

    @contextmanager
    def s3(self):
        """A server on the laptop that speaks S3, whose keys every machine has; its only bucket."""
        place = f"{self.laptop.ip}:{S3_PORT}"
        server = self.laptop.popen(
            f"python -c 'from moto.server import main; main()' -H {self.laptop.ip} -p {S3_PORT} "
            "> s3.log 2>&1"
        )
        wait_for(lambda: listens(self.laptop.pid, S3_PORT), "the S3 server", 60)
        keys = "".join(f"{key.lower()} = {value}\n" for key, value in KEYS.items())
        for host in (self.head, *self.workers):
            host.path("~/.aws").mkdir(exist_ok=True)
            host.path("~/.aws/credentials").write_text(f"[default]\n{keys}")
        self.laptop.run(
            'python -c \'import boto3; boto3.client("s3", region_name="us-east-1", '
            f'endpoint_url="http://{place}").create_bucket(Bucket="results")\'',
            env=KEYS,
        )
        yield f"s3://results?endpoint_override={place}&scheme=http&region=us-east-1"
        self.laptop.end(server)

    def submit_job(self, command, timeout=180.0):
        address = f"http://127.0.0.1:{DASHBOARD}"
        return self.on_laptop(f"ray job submit --address {address} {command}", timeout=timeout)

    def wait_for_nodes(self, *wanted, limit=180):
        """Until Ray takes these hosts for alive, and no others."""
        self.head.path("~/nodes.py").write_text(NODES)
        ips = " ".join(host.ip for host in wanted)
        self.head.run(f"python nodes.py {ips}", env={"RAY_AUTH_MODE": "token"}, timeout=limit)


NODES = """
import sys, time, ray
ray.init("auto", log_to_driver=False)
while {n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]} != set(sys.argv[1:]):
    time.sleep(0.5)
"""

# Prints which machines the actors of each class are on.
WHERE = """
import json, ray
from ray._private.state import actors
ray.init("auto", log_to_driver=False)
names = {n["NodeID"]: n["NodeManagerHostname"] for n in ray.nodes()}
found = {}
for a in actors().values():
    if a["State"] == "ALIVE":
        kind = a["ActorClassName"].split(".")[-1]
        found.setdefault(kind, []).append(names[a["Address"]["NodeID"]])
print(json.dumps({kind: sorted(hosts) for kind, hosts in found.items()}))
"""

PHASES = """
import json, ray
from saeray.client.status import look
from saeray.cluster.registry import read_all
ray.init("auto", log_to_driver=False)
running = {r.name: look(r) for r in read_all() if not r.ended}
print(json.dumps({name: status.phase for name, status in running.items() if status is not None}))
"""

IN_PYTHON = """
import yaml, saeray
config = yaml.safe_load(open("sweep.yaml"))
result = saeray.sweep(config, name="a", storage_path="BUCKET", address="auto", live=False)
print(result.summary())
"""

BY_TUNE = """
import sys, ray, yaml, saeray
from ray import tune

ray.init(sys.argv[1], runtime_env=saeray.runtime_env(), namespace="saeray")
config = yaml.safe_load(open("sweep.yaml"))
config["lr"] = tune.grid_search(config["lr"])
done = tune.run(saeray.SAETrial, name="b", config=config, verbose=0)
print(json.dumps([t.last_result["n_training_tokens"] for t in done.trials]))
""".replace("import sys", "import json, sys")

PACKAGE = """
import json, os, socket, sys, ray, saeray

ray.init(sys.argv[1], runtime_env={"py_modules": [os.path.dirname(saeray.__file__)]})

@ray.remote(num_cpus=0.1, label_selector={"machine": "worker1"})
def mark():
    import saeray
    return [socket.gethostname(), getattr(saeray, "MARK", None)]

print(json.dumps(ray.get(mark.remote(), timeout=60)))
"""


@pytest.fixture(scope="module")
def cluster(request):
    capture = request.config.pluginmanager.getplugin("capturemanager")
    started = time.monotonic()
    with hosts.hosts("laptop", "head", "worker1", "worker2") as by_name:
        cluster = Cluster(by_name)
        cluster.up()
        up = time.monotonic() - started
        cluster.wait_for_nodes(cluster.head, *cluster.workers)
        with capture.global_and_fixture_disabled():
            print(f"\nray up: {up:.0f} s, all nodes: {time.monotonic() - started:.0f} s")
        cluster.laptop.popen(
            f"ray dashboard -p {DASHBOARD} cluster.yaml > dashboard.log 2>&1", env=SHELL
        )
        wait_for(lambda: listens(cluster.laptop.pid, DASHBOARD), "the tunnel", 60)
        yield cluster


@pytest.mark.ci
def test_the_dashboard_listens_on_the_heads_loopback_only(cluster):
    assert listens(cluster.head.pid, DASHBOARD)
    refused = cluster.laptop.run(f"curl -sS http://{cluster.head.ip}:{DASHBOARD}", check=False)
    assert refused.returncode == 7, refused.stdout


@pytest.mark.ci
def test_a_job_without_the_token_is_refused(cluster):
    command = f"ray job submit --address http://127.0.0.1:{DASHBOARD} -- hostname"
    refused = cluster.laptop.run(command, env={"RAY_AUTH_MODE": "disabled"}, check=False)
    assert refused.returncode != 0
    assert "uthenticat" in refused.stdout


@pytest.mark.ci
def test_ray_status_by_ray_exec(cluster):
    """The autoscaler takes some seconds more to see that the nodes it has set up are there."""

    def all_there():
        said = cluster.on_laptop("ray exec cluster.yaml 'ray status'")
        return "3 local.cluster.node" in said and "/6.0 CPU" in said

    wait_for(all_there, "three nodes in `ray status`", 60)


@pytest.mark.ci
def test_a_token_that_is_not_the_clusters_is_told_what_to_set(cluster):
    refused = cluster.saeray(
        f"status --address {cluster.client}", env={"RAY_AUTH_TOKEN": "0" * 32}, check=False
    )
    assert "no Ray cluster answers there" in refused
    assert "RAY_AUTH_MODE is token and a token is there" in refused
    assert "copy the head's ~/.ray/auth_token here" in refused
    assert "Traceback" not in refused


def test_a_script_by_ray_submit_with_its_results_on_s3(cluster, undisturbed):
    """(a) The script runs on the head; the laptop fetches from S3, without the cluster."""
    cluster.write_sweep("~/sweep.yaml")
    with cluster.s3() as bucket:
        cluster.laptop.path("~/program.py").write_text(IN_PYTHON.replace("BUCKET", bucket))
        cluster.on_laptop("ray rsync-up cluster.yaml sweep.yaml '~/sweep.yaml'")
        said = cluster.on_laptop("ray submit cluster.yaml program.py", timeout=180)
        assert "LM tokens harvested: 245,760" in said
        key, _, query = bucket.partition("?")
        said = cluster.saeray(f"fetch {shlex.quote(f'{key}/a?{query}')} a", env=KEYS)
    assert "fetched 16 files" in said
    assert_same(cluster.fetched("a"), undisturbed)


@pytest.mark.ci
def test_tune_run_over_ray_client(cluster, undisturbed):
    """(b)"""
    cluster.write_sweep("~/sweep.yaml")
    assert cluster.python(BY_TUNE, cluster.client, timeout=180) == [245760, 245760]
    cluster.saeray(f"fetch b b --address {cluster.client}")
    assert set(cluster.fetched("b").weights().values()) == set(undisturbed.weights().values())


@pytest.mark.ci
def test_the_job_server_and_ctrl_c_which_saves_what_is_trained(cluster, undisturbed):
    """(c) Harvesters on one machine, trainers on the other. It goes on by its name."""
    cluster.write_sweep("~/sweep.yaml", LABELLED, checkpoint_every_s=0.2)
    address = f"--address http://127.0.0.1:{DASHBOARD}"
    sweep = cluster.start_saeray(f"sweep sweep.yaml --name c {address}")
    there = Ended(cluster.head.path("~/results"), "c")
    wait_for(lambda: there.steps() >= 40, "the training", 120)
    with cluster.harvest_held():
        where = wait_for(lambda: cluster.where("SAETrial", 2), "the trials", 60)
        assert where["Harvester"] == ["worker1"]
        assert where["RayTrainWorker"] == ["worker2"]
        assert where["ActivationBuffer"] == where["Roster"] == ["head"]
        assert where["SAETrial"] == ["head", "head"]
        (pid,) = [p for p, line in cluster.laptop.processes().items() if "saeray sweep" in line
                  and "python" in line.split()[0]]  # fmt: skip
        os.kill(pid, signal.SIGINT)
        wait_for(lambda: cluster.phases().get("c") == "stopping", "the word to stop", 60)
    said = cluster.laptop.path("~/said")
    assert sweep.wait(timeout=90) == 130, said.read_text()
    assert "submitted as raysubmit_" in said.read_text()
    assert "harvester (0.5 CPUs, label machine=worker1)" in said.read_text()
    assert there.steps() < 480
    listed = json.loads(cluster.saeray(f"status --json --address {cluster.client} 2> /dev/null"))
    assert [s["state"] for s in listed if s["name"] == "c"] == ["interrupted"]

    resumed = cluster.saeray(f"sweep --resume c {address}", timeout=180)
    assert re.search(r"training: .*harvested .* buffer \d+/12 blocks", resumed)  # seen from here
    listed = cluster.saeray(f"status {address}")
    assert re.search(r"^c +done +2/2 +100%", listed, re.MULTILINE)
    cluster.saeray(f"fetch c c --address {cluster.client}")
    assert_same(cluster.fetched("c"), undisturbed)


def test_two_ranks_on_two_machines(cluster, undisturbed):
    """(d) The command line over Ray Client; results come home."""
    ranks = dict(
        num_workers=2,
        trainer_cpus=2,  # all that a machine has
        trainer_labels={"machine": "in(worker1,worker2)"},
        harvester_labels={"machine": "head"},
    )
    cluster.write_sweep("~/sweep.yaml", ranks)
    sweep = cluster.start_saeray(f"sweep sweep.yaml --name d --address {cluster.client}")
    where = wait_for(lambda: cluster.where("RayTrainWorker", 2), "the trainer", 90)
    assert where["RayTrainWorker"] == ["worker1", "worker2"]
    assert sweep.wait(timeout=180) == 0, cluster.laptop.path("~/said").read_text()
    mine = cluster.fetched("d", "results/d")
    assert [r["status"] for r in mine.rows] == ["done", "done"]
    # Other sums round otherwise, and where features are resampled, from step 64 on, a draw can turn
    # out otherwise for it: then an SAE is another one.
    theirs = undisturbed.logs()
    for name, lines in mine.logs().items():
        for ours, of_one in zip(lines[:12], theirs[name], strict=False):
            assert ours["step"] == of_one["step"] <= 60
            for figure in ("losses/overall_loss", "metrics/l0"):
                assert ours[figure] == pytest.approx(of_one[figure], rel=0.01), (name, ours["step"])
    for ours, theirs in zip(mine.rows, undisturbed.rows, strict=True):
        assert ours["n_training_tokens"] == theirs["n_training_tokens"]
        assert ours["ce_loss_score"] == pytest.approx(theirs["ce_loss_score"], rel=0.1)


@pytest.mark.ci
def test_the_hosts_have_the_package_that_ray_up_gave_them(cluster):
    said = cluster.submit_job("-- python -c 'import saeray; print(saeray.__file__)'")
    assert f"{hosts.HOME}/saeray/saeray/__init__.py" in said
    said = cluster.submit_job("-- saeray status")  # the command, in a job submitted by hand
    assert re.search(r"^c +done +2/2 +100%", said, re.MULTILINE)


@pytest.mark.ci
def test_a_package_changed_on_the_laptop_travels_with_its_program(cluster):
    cluster.laptop.checkout("~/changed")
    with cluster.laptop.path("~/changed/saeray/__init__.py").open("a") as file:
        file.write('\nMARK = "changed"\n')
    env = {"PYTHONPATH": f"{hosts.HOME}/changed"}
    assert cluster.python(PACKAGE, cluster.client, env=env) == ["worker1", "changed"]


def test_a_machine_is_lost_in_mid_sweep_and_the_results_are_the_same(cluster, undisturbed, capsys):
    """(e) The one that trains, or else both would have to be waited for."""
    one_core = dict(
        saes_per_trainer=2, trainer_cpus=1, trainer_labels={"machine": "in(worker1,worker2)"}
    )
    cluster.write_sweep("~/sweep.yaml", one_core, **DISTURBED)
    sweep = cluster.start_saeray(f"sweep sweep.yaml --name e --address {cluster.client}")
    there = Ended(cluster.head.path("~/results"), "e")
    wait_for(lambda: there.steps() >= 40, "the training", 120)
    with cluster.harvest_held():
        (name,) = cluster.where("RayTrainWorker")["RayTrainWorker"]
        lost = cluster.hosts[name]
        killed, reached = time.monotonic(), there.steps()
        lost.kill()
    assert not lost.processes()
    wait_for(lambda: there.steps() > reached + 30, "it to go on", 180)
    with capsys.disabled():
        print(f"\n{name} lost at {reached} steps: 30 more after {time.monotonic() - killed:.0f} s")
    assert sweep.wait(timeout=180) == 0, cluster.laptop.path("~/said").read_text()
    assert_same(cluster.fetched("e", "results/e"), undisturbed)
    others = [w for w in cluster.workers if w is not lost]
    cluster.wait_for_nodes(cluster.head, *others)


@pytest.mark.ci
def test_ray_down_leaves_no_process_of_ray_on_any_host(cluster, capsys):
    started = time.monotonic()
    assert any(host.ray_processes() for host in cluster.hosts.values())
    said = cluster.on_laptop("ray down -y cluster.yaml", timeout=180)
    assert "No nodes remaining" in said
    assert not cluster.head.ray_processes()
    down = time.monotonic() - started
    living = [host for host in cluster.hosts.values() if host.alive and host is not cluster.laptop]
    wait_for(lambda: not any(h.ray_processes() for h in living), "the end of Ray", 120)
    with capsys.disabled():
        print(f"\nray down: {down:.0f} s, no process left after {time.monotonic() - started:.0f} s")
