"""No pickle in a sweep's folder, no key in any file, no foreign code, no foreign escape codes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from support.bundled import MODEL

from saeray.client.cli import main
from saeray.errors import ConfigError
from saeray.lm.model import LanguageModel
from saeray.spec.config import LanguageModelSAERunnerConfig

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_thisIsATokenThatMustNotBeWritten",
    "AWS_SECRET_ACCESS_KEY": "aws/thisIsAKeyThatMustNotBeWritten",
}


def files_with(folder, words):
    """Files below a folder in which one of the words stands."""
    found = []
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            found += [str(path) for word in words if word.encode() in data]
    return found


def test_no_key_and_no_pickle_in_any_file_of_a_sweep(tiny, tmp_path):
    file = tmp_path / "sweep.yaml"
    tiny |= dict(log_to_wandb=True, n_checkpoints=2, activation_cache=str(tmp_path / "cache"))
    file.write_text(yaml.safe_dump(tiny))
    session = Path("/tmp") / f"saeray-{os.getpid()}"  # short: Ray's sockets lie in it
    env = os.environ | SECRETS | {"WANDB_MODE": "offline", "RAY_TMPDIR": str(session)}
    done = subprocess.run(
        [sys.executable, "-m", "saeray", "sweep", str(file), "--name", "s",
         "--storage-path", str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "s" / "wandb").glob("offline-run-*/*.wandb"))
    assert files_with(tmp_path, SECRETS.values()) == []
    # Nor in what Ray writes meanwhile: its logs outlive the sweep.
    logs = list(session.rglob("logs"))
    assert logs
    assert [f for log in logs for f in files_with(log, SECRETS.values())] == []
    shutil.rmtree(session)
    known = {".safetensors", ".json", ".jsonl", ".yaml", ".csv", ".parquet", ".png", ".arrow"}
    of_wandb = {".wandb", ".log", ".txt", ""}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert path.suffix in known | (of_wandb if "wandb" in path.parts else set()), path
            assert not path.read_bytes().startswith(b"\x80"), path  # how a pickle begins


def test_a_models_own_code_is_not_run_unless_asked(tiny, tmp_path):
    model, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(MODEL, model, ignore=shutil.ignore_patterns("text"))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {
        "AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"}}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    (model / "foreign.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    fields = tiny | dict(model_name=str(model))
    with pytest.raises(ConfigError, match=r"model_name|trust_remote_code"):
        LanguageModel(LanguageModelSAERunnerConfig(**fields), [tiny["hook_point"]])
    assert not ran.exists()


def test_escape_codes_of_a_dataset_do_not_reach_the_terminal(tiny, tmp_path, capsys):
    table = pa.table({"\x1b[2J\x1b]0;gotcha\x07": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(tiny | dict(dataset_path=str(tmp_path / "t.parquet"))))
    assert main(["sweep", str(file), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "gotcha" in said
    assert "\\x1b" in said
    assert "\x1b" not in said
    assert "\x07" not in said
