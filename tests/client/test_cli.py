"""The command line: exit codes, overrides, and errors of one paragraph without a traceback."""

import os
import re

import pytest
import yaml
from support.bundled import MODEL, ROOT

from saeray.client.cli import load_sweep_file, main
from saeray.client.session import absolute
from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import SAE, expand

TEXT = MODEL / "text" / "train.parquet"


def sweep_file(tmp_path, **fields):
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(fields))
    return str(file)


def test_overrides_are_yaml_and_reach_into_resources(tmp_path):
    file = sweep_file(tmp_path, lr=1e-3, resources={"harvesters": 1})
    data = load_sweep_file(
        file, ["lr=[1e-4, 4e-4]", "resources.harvesters=3", "use_ghost_grads=true", "name=a=b"]
    )
    assert data["resources"] == {"harvesters": 3}
    assert [float(x) for x in data["lr"]] == [1e-4, 4e-4]
    assert data["use_ghost_grads"] is True
    assert data["name"] == "a=b"


def test_model_and_dataset_may_be_relative_to_the_file(tmp_path):
    (tmp_path / "text.parquet").touch()
    data = load_sweep_file(sweep_file(tmp_path, dataset_path="text.parquet", model_name="gpt2"))
    assert data["dataset_path"] == str((tmp_path / "text.parquet").resolve())
    assert data["model_name"] == "gpt2"
    axis = ["text.parquet", str(tmp_path / "text.parquet"), "hub/name", "saeray:models/x"]
    data = load_sweep_file(sweep_file(tmp_path, dataset_path=axis))
    assert data["dataset_path"] == [str((tmp_path / "text.parquet").resolve()), *axis[1:]]


def test_paths_in_a_list_are_found_like_a_single_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.parquet").touch()
    here = str(tmp_path / "text.parquet")
    axis = ["text.parquet", "~/text.parquet", str(MODEL), "saeray:models/x", "hub/name"]
    bundled = "saeray:models/tiny-python"
    assert absolute(axis) == [here, here, bundled, "saeray:models/x", "hub/name"]
    assert [absolute(one) for one in axis] == absolute(axis)


@pytest.mark.parametrize(
    ("text", "words"),
    [("- a\n- b", "at the top level"), ("a: [", "not YAML"), (None, "can't be read")],
)
def test_files_that_are_no_sweeps(tmp_path, text, words):
    file = tmp_path / "x.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_sweep_file(file)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "l1_coeficient=1"], "unknown key 'l1_coeficient'; did you mean l1_coefficient"),
        (["--set", "training_tokens=100"], "training_tokens = 100"),
        (["--set", "lr=[1e-3, 1e-3]"], "duplicate trial"),
        (["--set", "resources.harvester=1"], "resources: unknown key 'harvester'"),
        (["--set", "hook_point=blocks.2.hook_resid_prr", "--dry-run"], "no such hook"),
        (["--set", "d_in=64", "--dry-run"], "d_in = 64"),
        (["--set", "dataset_path=/no/such.parquet", "--dry-run"], "no such file or directory"),
        (["--set", "context_size=1024", "--dry-run"], "context_size = 1024"),
        # Of a grid over streams, each: its text, its model, its buffer.
        (["--set", f"dataset_path=[{TEXT},/no/such.parquet]", "--dry-run"], "no such file"),
        (["--set", "context_size=[64,1024]", "--dry-run"], "context_size = 1024"),
        (["--set", "name=../outside"], "name = '../outside'"),
        (["--name", "a/b"], "name = 'a/b'"),
    ],
)
def test_bad_input_is_one_paragraph_and_exit_code_2(arguments, words, capsys):
    assert main(["sweep", str(ROOT / "sweeps" / "tiny.yaml"), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("saeray: ")]) == 1


def test_a_dry_run_prints_the_plan_and_starts_nothing(capsys):
    assert main(["sweep", str(ROOT / "sweeps" / "tiny.yaml"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "6 SAEs on 1 activation stream" in out
    # 1,048,576 tokens in LM batches of 32 x 128; three half buffers of 8 blocks of 2 MiB.
    assert "1,048,576 LM tokens in 256 blocks of 4,096" in out
    assert "24 blocks, 50,331,648 bytes" in out
    assert "on this machine alone: memory: 50.3 MB of the object store, 1 x 662 MB for" in out
    assert "750 MB for trials" in out  # 125 each
    assert "d_in 128, d_sae 1,024" in out
    assert "on this machine alone: 1 pack, 1 at a time; 1 pass of the language model" in out
    # 1,048,576 tokens of the bundled text's train.parquet.
    assert re.search(r"text: about [\d,]+ tokens in [\d,]+ documents .* are \d", out)
    # d_in 128; the norms are those of the bundled model on its held-out text.
    assert "of centred_norm ≈ 1.62, 4.05, 13.5 of sum; ≈ 0.0127, 0.0317, 0.106 of none" in out
    assert "!" not in out


def test_a_dry_run_for_a_gpu_needs_none(capsys):
    options = ["--set", "device=cuda", "--set", "expansion_factor=[4, 8]", "--dry-run"]
    assert main(["sweep", str(ROOT / "sweeps" / "tiny.yaml"), *options]) == 0
    out = capsys.readouterr().out
    assert "d_sae 512, 1,024" in out
    assert re.search(r"with a GPU, which this machine has not: 1 harvester \(.* GPUs\)", out)
    # 6 SAEs of 2 * 128 * 512 + 640 numbers and 6 of 2 * 128 * 1024 + 1152, float32; Adam has two
    # numbers for each.
    n = 6 * (2 * 128 * 512 + 640) + 6 * (2 * 128 * 1024 + 1152)
    assert re.search(r"GPU memory: \d+ MB for a rank of the largest pack \(", out)
    assert f"({n * 4 / 1e6:.3g} MB weights, {n * 8 / 1e6:.3g} MB Adam, " in out
    assert "time: not told, since there is no GPU here to measure on" in out


def test_a_dry_run_is_of_no_job(capsys):
    there = ["--dry-run", "--address", "http://127.0.0.1:1"]
    assert main(["sweep", str(ROOT / "sweeps" / "tiny.yaml"), *there]) == 2
    assert "--dry-run takes ray://HOST:10001" in capsys.readouterr().err


def test_a_dry_run_warns_of_what_is_odd(capsys):
    odd = ["--set", "lr_warm_up_steps=2000", "--set", "lr=[1e-3,2e-3]", "--dry-run"]
    assert main(["sweep", str(ROOT / "sweeps" / "tiny.yaml"), *odd]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!")]
    # 1,048,576 tokens in batches of 4,096; one line for all SAEs.
    (warning,) = warnings
    assert warning.startswith("! lr_warm_up_steps = 2,000: training ends after 256 steps")


def test_a_dry_run_says_how_many_passes_over_the_text_there_will_be(capsys):
    most = max(1, (os.cpu_count() or 1) - 1)  # beside a harvester there is room for one of these
    apart = ["train_batch_size=[2048,4096]", f"resources.trainer_cpus={most}"]
    options = [x for one in apart for x in ("--set", one)]
    assert main(["sweep", str(ROOT / "sweeps" / "tiny.yaml"), *options, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "; 2 passes over the text (2 packs, 1 at a time); one by resources.trainer_cpus: " in out


def test_every_shipped_sweep_file_is_a_valid_config():
    files = sorted((ROOT / "sweeps").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        saes = expand(LanguageModelSAERunnerConfig.from_dict(load_sweep_file(file), str(file)))
        assert all(isinstance(s, SAE) for s in saes)
        assert file.read_text().startswith("# ")  # says what it is for and what it costs
