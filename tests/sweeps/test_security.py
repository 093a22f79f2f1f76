"""No foreign code is run and no foreign escape codes are printed."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from support.bundled import MODEL

from saeray.client.cli import main
from saeray.errors import ConfigError
from saeray.lm.model import LanguageModel
from saeray.spec.config import LanguageModelSAERunnerConfig


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
