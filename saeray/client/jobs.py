"""Sweeps as Ray jobs, through the job server of a cluster's dashboard (`http://HOST:8265`).

The job runs the same command line on the head node, with this machine's package. It writes how it
stands into a small file among Ray's logs, which the dashboard serves: that is what the live view
here draws. Nothing of a sweep depends on who looks.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from saeray.actors.waiting import NotYet
from saeray.client.connect import runtime_env, why_not
from saeray.client.driver import home_copy
from saeray.client.result import SweepResult
from saeray.client.session import with_absolute_inputs
from saeray.client.speed import Times
from saeray.client.status_file import STATUS_FILE, status_from
from saeray.client.watch import Outcome, watch
from saeray.errors import SaerayError
from saeray.files import strict_json
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.messages import NAMESPACE, SweepStatus

SWEEP_FILE = "sweep.yaml"
POLL_SECONDS = 2.0
GONE = ("STOPPED", "SUCCEEDED", "FAILED")


class Job:
    """One command of ours, as a Ray job."""

    def __init__(self, address: str, arguments: list[str], files: dict[str, str]) -> None:
        """files: what the command finds in its working directory, by name.

        Raises:
            ConfigError: no job server answers there.
        """
        from ray.job_submission import JobSubmissionClient

        self.address = address
        self.status_file = f"saeray-{uuid.uuid4().hex[:12]}.json"
        self.said = 0  # characters of the job's output that were passed on
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                (Path(folder) / name).write_text(text, encoding="utf-8")
            env = runtime_env()
            env["env_vars"] = {**env["env_vars"], **travelling(), STATUS_FILE: self.status_file}
            env["working_dir"] = folder
            try:
                self.client = JobSubmissionClient(address)
                self.id = self.client.submit_job(
                    entrypoint=shlex.join(["python", "-m", "saeray", *arguments]),
                    runtime_env=env,
                    metadata={"saeray": " ".join(arguments)},
                )
            except (ConnectionError, RuntimeError) as error:
                raise why_not(address, error) from None

    def ended(self) -> bool:
        return str(self.client.get_job_status(self.id).value) in GONE

    def output(self) -> str:
        return str(self.client.get_job_logs(self.id))

    def written(self) -> dict[str, Any] | None:
        """What the job wrote into its status file last; None while there is none."""
        node = self.client.get_job_info(self.id).driver_node_id
        if node is None:
            return None
        # `ray.util.state.get_log` takes no http:// address; the client adds the token.
        place = f"/api/v0/logs/file?node_id={node}&filename={self.status_file}&lines=-1&format=text"
        try:
            data = strict_json.loads(self.client._do_request("GET", place).content)
        except Exception:  # no such file yet, or the dashboard is busy: the next look will tell
            return None
        return data if isinstance(data, dict) else None

    # --- for `watch` ------------------------------------------------------------------------

    def look(self) -> SweepStatus:
        data = self.written()
        if data is None:
            return SweepStatus(rows=[], phase="the job is being started")
        return status_from(data)

    def outcome(self) -> Outcome | NotYet:
        time.sleep(POLL_SECONDS)
        if not self.ended():
            return NotYet("the job")
        data = self.written() or {}
        status = status_from(data) if data else SweepStatus(rows=[], phase="ended")
        if "results" not in data:
            return Outcome([], status, f"the job {self.id} failed:\n{last_words(self.output())}")
        times = data.get("times")  # none from a cluster with an earlier version
        return Outcome(data["results"], status, times=None if times is None else Times(*times))


def last_words(output: str) -> str:
    """Of a job's output: our own error where there is one, else the end."""
    lines = output.strip().splitlines()
    ours = [line for line in lines if line.startswith("saeray: ")]
    return ours[-1] if ours else "\n".join(lines[-15:])


def travelling() -> dict[str, str]:
    """The part of this environment that a job is given: never keys, which Ray would log."""
    names = ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL", "HF_ENDPOINT")
    return {name: os.environ[name] for name in names if name in os.environ}


def sweep_as_job(
    config: LanguageModelSAERunnerConfig, address: str, namespace: str | None, live: bool
) -> SweepResult:
    """`saeray.sweep` as a job on the cluster."""
    name, storage_path = config.name, config.storage_path
    assert name is not None and storage_path is not None
    text = yaml.safe_dump(with_absolute_inputs(config).to_dict(), sort_keys=False)
    arguments = ["sweep", SWEEP_FILE, "--storage-path", below_home(storage_path)]
    return follow(address, arguments, namespace, name, {SWEEP_FILE: text}, live)


def resume_as_job(
    folder: str, address: str, namespace: str | None, live: bool, changes: Mapping[str, Any]
) -> SweepResult:
    """`saeray.resume` as a job on the cluster."""
    name = Folder.at(folder).name
    place = below_home(folder) if "/" in folder else folder  # or a name that the cluster knows
    arguments = ["sweep", "--resume", place]
    for key, value in changes.items():
        arguments += ["--set", f"{key}={strict_json.dumps(value)}"]
    return follow(address, arguments, namespace, name, {}, live)


def below_home(path: str) -> str:
    """A relative path, which would mean the job's working directory, as one in the head's home."""
    return path if home_copy(path) is None else f"~/{path}"


def follow(
    address: str,
    arguments: list[str],
    namespace: str | None,
    name: str,
    files: dict[str, str],
    live: bool,
) -> SweepResult:
    if namespace is not None:
        arguments = [*arguments, "--namespace", namespace]
    job = Job(address, arguments, files)
    print(f"submitted as {job.id}", file=sys.stderr)

    def stop() -> None:
        command_as_job(["stop", f"{namespace or NAMESPACE}/{name}"], address)

    outcome = watch(job.look, job.outcome, stop, name, live)
    if outcome.error is not None:
        raise SaerayError(outcome.error)
    place = Folder.at(folder_of(outcome, name))
    return SweepResult(name, place, outcome.rows, outcome.status, outcome.times)


def folder_of(outcome: Outcome, name: str) -> str:
    """Where the cluster has the results: above any SAE's `trials/<SAE>/final`."""
    paths = [row["path"] for row in outcome.rows if row.get("path")]
    return paths[0].partition("/trials/")[0] if paths else name


def command_as_job(arguments: list[str], address: str) -> int:
    """Runs one of our commands on the cluster and prints what it prints; its exit code."""
    job = Job(address, arguments, {})
    while not job.ended():
        time.sleep(POLL_SECONDS / 2)
    print(job.output().rstrip())
    return 0 if str(job.client.get_job_status(job.id).value) == "SUCCEEDED" else 1
