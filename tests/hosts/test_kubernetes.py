"""examples/rayjob.yaml: KubeRay takes it, and what it runs are commands and a sweep of ours."""

import copy
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from support.bundled import ROOT

from saeray.client.cli import parser
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import expand

MANIFEST = ROOT / "examples" / "rayjob.yaml"
# KubeRay's own definition, trimmed: it says of which version it is.
DEFINITION = Path(__file__).parent.parent / "support" / "kuberay_rayjob.json"
IMAGE = ROOT / "examples" / "Dockerfile"


def strict(schema):
    """The schema as JSON Schema, in which fields that it does not name are refused.

    (Kubernetes drops them; here they would be slips.) Quantities are numbers or text.
    """
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-")}
    if schema.get("x-kubernetes-int-or-string"):
        made = {"type": ["integer", "string"]}
    if "properties" in schema and "additionalProperties" not in schema:
        made["additionalProperties"] = False
    return made


def faults(job):
    validator = Draft202012Validator(strict(json.loads(DEFINITION.read_text())["schema"]))
    return ["/".join(map(str, e.path)) + ": " + e.message[:80] for e in validator.iter_errors(job)]


@pytest.fixture(scope="module")
def documents():
    job, files = yaml.safe_load_all(MANIFEST.read_text())
    return job, files


def test_it_is_a_rayjob_as_kuberay_defines_it(documents):
    job, _ = documents
    definition = json.loads(DEFINITION.read_text())
    assert (job["apiVersion"], job["kind"]) == (f"{definition['group']}/v1", definition["kind"])
    assert faults(job) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backoffLimt"), 3),
        (("spec", "ttlSecondsAfterFinished"), "60"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "label"), {}),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers"), None),
    ],
)
def test_a_slip_would_be_found(documents, path, value):
    job = copy.deepcopy(documents[0])
    inner = job
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert faults(job)


def test_its_script_runs_commands_of_ours(documents, tmp_path):
    """With a `saeray` that writes down what it is asked, and finds nothing to resume."""
    _, files = documents
    (tmp_path / "run.sh").write_text(files["data"]["run.sh"])
    fake = tmp_path / "saeray"
    fake.write_text('#!/bin/bash\necho "$@" >> asked\n[ "$2" = --resume ] && exit $CODE; exit 0\n')
    fake.chmod(0o755)

    def asked(code):
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": str(code)}
        done = subprocess.run(["bash", "run.sh"], cwd=tmp_path, env=env, timeout=30)
        lines = (tmp_path / "asked").read_text().splitlines()
        (tmp_path / "asked").unlink()
        return done.returncode, [parser().parse_args(line.split()) for line in lines]

    code, (resumed, swept) = asked(2)
    assert code == 0
    assert resumed.resume == f"{swept.storage_path}/{swept.name}"
    mounted = documents[0]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    (mount,) = mounted["containers"][0]["volumeMounts"]
    folder, _, name = swept.file.rpartition("/")
    assert folder == mount["mountPath"] and name in files["data"]
    (volume,) = mounted["volumes"]
    assert volume["name"] == mount["name"]
    assert volume["configMap"]["name"] == files["metadata"]["name"]
    for code in (0, 1):
        assert asked(code)[0] == code


def test_its_sweep_is_one_and_asks_for_what_its_pods_are(documents):
    job, files = documents
    data = yaml.safe_load(files["data"]["mine.yaml"])
    assert len(expand(LanguageModelSAERunnerConfig.from_dict(data))) == 3
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    asked = data["resources"]
    assert [g["labels"] for g in groups] == [asked["harvester_labels"], asked["trainer_labels"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        # No autoscaler: saeray plans with the pods that are there.
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


def test_its_ray_is_the_one_that_is_tested(documents):
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    assert documents[0]["spec"]["rayClusterSpec"]["rayVersion"] == pinned["ray"]
    assert re.findall(r"FROM rayproject/ray:([\d.]+)-", IMAGE.read_text()) == [pinned["ray"]]
