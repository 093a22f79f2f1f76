"""Sweeps that run beside a test, which disturbs them, and one that nobody disturbs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from types import MappingProxyType

import psutil
import ray
import yaml
from support.bundled import fields

import saeray
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder

STEPS = 240


def config():
    return fields(
        expansion_factor=8,
        lr=[1e-3, 3e-3],
        l1_coefficient=4e-3,  # so that features die, and are resampled
        lr_warm_up_steps=20,
        training_tokens=STEPS * 1024,
        train_batch_size=1024,
        n_batches_in_buffer=8,
        b_dec_init_rows=512,
        eval_every=60,
        wandb_log_frequency=5,
        use_ghost_grads=True,
        feature_sampling_method="anthropic",
        dead_feature_window=30,
        feature_sampling_window=64,  # kills and resumes come in the middle of one
    )


# What a sweep that is disturbed has beside `config()`; it changes no byte of the outcome.
DISTURBED = dict(checkpoint_every_s=1.0)


# Of Ray's head: a node that is gone is noticed in seconds. By default it takes 15 of them where its
# port refuses connections, and more than 60 where nothing answers.
# Can't be written to: Ray adds to the mapping it is given, and the hosts export what is in it.
QUICK_HEALTH_CHECKS = MappingProxyType(
    {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 3000,
        "health_check_failure_threshold": 3,
    }
)


def weights_of(result, **of):
    """The weights, as bytes, of the one SAE of a result, or the one with these values."""
    (row,) = [r for r in result.rows if all(r[k] == v for k, v in of.items())]
    return (result.folder / "trials" / row["trial"] / "final").read("sae_weights.safetensors")


def pids(kind):
    """Of the living actors of a class."""
    from ray._private.state import actors

    return {
        int(a["Pid"])
        for a in actors().values()
        if a["ActorClassName"].split(".")[-1] == kind and a["State"] == "ALIVE"
    }


@contextmanager
def held(pids):
    """These processes do nothing meanwhile. With a sweep's harvesters held it can't end.

    For whatever takes seconds beside it, as to connect or to add a node: on a fast machine a whole
    sweep of these tests ends meanwhile.
    """
    pids = list(pids)
    assert pids

    def send(number):
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    send(signal.SIGSTOP)
    try:
        yield
    finally:
        send(signal.SIGCONT)


def harvesters_below(pid):
    """Of the Rays that a process has started."""
    return [p.pid for p in psutil.Process(pid).children(recursive=True) if is_harvester(p)]


def is_harvester(process):
    try:
        return process.name().startswith("ray::Harvester")
    except psutil.Error:
        return False  # it has ended


class Ended:
    """The files of a sweep."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name

    @property
    def rows(self):
        place = Folder.at(self.folder / self.name)
        return SweepFolder(place, self.name).read_rows()

    def steps(self):
        """Steps of all SAEs, as their logs say."""
        total = 0
        for log in (self.folder / self.name / "trials").glob("*/metrics.jsonl"):
            total += log.read_text().count("\n") * 5
        return total

    def logs(self):
        """Every line of every metrics.jsonl, without what depends on the clock."""
        return {
            log.parent.name: [
                {k: v for k, v in json.loads(line).items() if k != "details/training_seconds"}
                for line in log.read_text().splitlines()
            ]
            for log in (self.folder / self.name / "trials").glob("*/metrics.jsonl")
        }

    def weights(self):
        return {
            trial.parent.name: Folder.at(str(trial)).read("sae_weights.safetensors")
            for trial in (self.folder / self.name / "trials").glob("*/final")
        }

    def features(self):
        return {
            file.parent.name: file.read_bytes()
            for file in (self.folder / self.name / "trials").glob("*/features.parquet")
        }


class Running(Ended):
    """A sweep in a thread of its own, and how far it is."""

    def __init__(self, folder, name, **changes):
        super().__init__(folder, name)
        self.result = self.error = None
        self.config = config() | DISTURBED | changes
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        try:
            self.result = saeray.sweep(
                self.config, name=self.name, storage_path=self.folder, live=False
            )
        except BaseException as error:
            self.error = error

    def wait_for(self, steps, limit=120.0):
        deadline = time.monotonic() + limit
        while self.steps() < steps:
            assert self.thread.is_alive(), self.error or "it ended before it was killed"
            assert time.monotonic() < deadline, f"stands at {self.steps()} steps"
            time.sleep(0.02)
        return self.steps()

    def end(self, limit=200.0):
        self.thread.join(timeout=limit)
        assert not self.thread.is_alive(), f"stands at {self.steps()} steps"
        if self.error is not None:
            raise self.error
        return self.result


def assert_same(running, undisturbed):
    """Byte for byte the same weights, and the same log but for its times.

    Logs first: they say at which step the first difference is, and in what.
    """
    mine, theirs = running.logs(), undisturbed.logs()
    assert mine.keys() == theirs.keys()
    for name in theirs:
        assert [r["step"] for r in mine[name]] == [r["step"] for r in theirs[name]], name
        for line, expected in zip(mine[name], theirs[name], strict=True):
            assert line == expected, f"{name}, step {expected['step']}"
    assert running.weights() == undisturbed.weights()
    assert running.features() == undisturbed.features()
    assert running.features().keys() == running.weights().keys()
    assert [r["status"] for r in running.rows] == ["done", "done"]
    figures = ("ce_loss_score", "l0", "explained_variance", "n_training_tokens")
    for mine, theirs in zip(running.rows, undisturbed.rows, strict=True):
        assert [mine[f] for f in figures] == [theirs[f] for f in figures]


def command(*arguments):
    """The command line, in a process of its own with a Ray of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "saeray", "sweep", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def left_alone(folder):
    """A sweep of `config()` that nobody disturbs, by the command line on a Ray of its own."""
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(config()))
    process = command(file, "--name", "undisturbed", "--storage-path", folder)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    return Ended(folder, "undisturbed")


def rosters(sweep):
    """Rosters of a sweep that are still there."""
    names = [n["name"] for n in ray.util.list_named_actors(all_namespaces=True)]
    return [n for n in names if n.startswith(f"roster:{sweep}:")]
