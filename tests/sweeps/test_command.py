"""The command, in a process of its own with a Ray of its own: what it says, and what it leaves.

One run serves all of it: the grid of `alone` and an SAE that fails, logged to wandb, by a user with
keys in the environment, on a cache that has every block.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.running import Ended, weights_of

from saeray.files.sweep_folder import SweepFolder

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_thisIsATokenThatMustNotBeWritten",
    "AWS_SECRET_ACCESS_KEY": "aws/thisIsAKeyThatMustNotBeWritten",
}


@pytest.fixture(scope="module")
def command(alone, tmp_path_factory):
    """What the command said, its exit code, and its folder; Ray's logs of it lie in `ray`."""
    folder = tmp_path_factory.mktemp("command")
    (config,) = SweepFolder(alone.folder, alone.name).read_configs().values()
    file = folder / "sweep.yaml"
    grid = dict(lr=[1e-3, 1e30], log_to_wandb=True, n_checkpoints=2, resources={})
    fields = config.to_dict() | grid | dict(name=None, storage_path=None, checkpoint_every_s=None)
    file.write_text(yaml.safe_dump(fields))
    session = Path("/tmp") / f"saeray-{os.getpid()}"  # short: Ray's sockets lie in it
    env = os.environ | SECRETS | {"WANDB_MODE": "offline", "RAY_TMPDIR": str(session)}
    done = subprocess.run(
        [sys.executable, "-m", "saeray", "sweep", str(file), "--name", "s",
         "--storage-path", str(folder)],
        env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    yield done, folder, session
    shutil.rmtree(session, ignore_errors=True)


def test_it_says_how_it_went_and_exits_with_1_when_an_sae_failed(command):
    done, folder, _ = command
    assert done.returncode == 1, done.stderr[-3000:]
    # Every block was in the cache.
    assert "LM tokens harvested: 0, 16,384 read from cache; one SAE trained on 16,384 (0.000x)" in (
        done.stdout
    )
    assert "lr=1e+30" in done.stdout
    assert "training" in done.stderr  # plain lines, not being a terminal
    assert "Traceback" not in done.stderr
    log = folder / "s" / "trials" / "lr=0.001" / "metrics.jsonl"
    assert [json.loads(x)["step"] for x in log.read_text().splitlines()] == [4, 8, 12, 16]


def test_a_failing_sae_does_not_touch_the_others_of_its_pack(command, alone):
    ended = Ended(command[1], "s")
    good, bad = ended.rows
    assert (good["status"], bad["status"]) == ("done", "failed")
    assert "at step 4" in bad["error"]  # the first log step
    assert "1e+30" in bad["error"]
    assert ended.weights()["lr=0.001"] == weights_of(alone)


def files_with(folder, words):
    """Files below a folder in which one of the words stands."""
    found = []
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            found += [str(path) for word in words if word.encode() in data]
    return found


def test_no_key_and_no_pickle_is_in_any_file(command):
    _, folder, session = command
    assert list((folder / "s" / "wandb").glob("offline-run-*/*.wandb"))
    assert files_with(folder, SECRETS.values()) == []
    # Nor in what Ray writes meanwhile: its logs outlive the sweep.
    logs = list(session.rglob("logs"))
    assert logs
    assert [f for log in logs for f in files_with(log, SECRETS.values())] == []
    known = {
        ".safetensors", ".json", ".jsonl", ".yaml", ".csv", ".parquet", ".png", ".html", ".arrow",
    }  # fmt: skip
    of_wandb = {".wandb", ".log", ".txt", ""}
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.suffix in known | (of_wandb if "wandb" in path.parts else set()), path
            assert not path.read_bytes().startswith(b"\x80"), path  # how a pickle begins
