"""What the command line teaches: its help, its demo's sweep file, completion in the shell."""

import argparse
import os
import shlex
import subprocess
import sys

import pytest
import yaml
from support.bundled import MODEL, ROOT

from saeray.client.cli import load_sweep_file, main, parser
from saeray.client.completion import fields_named
from saeray.client.examples import EXAMPLES, FIRST_STEPS
from saeray.lm.hub import here
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import expand


def commands():
    (found,) = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return found.choices


def parsed(line):
    """A command line, up to where the shell would put its output into a file."""
    program, *arguments = shlex.split(line.partition(" > ")[0])
    assert program == "saeray"
    return parser().parse_args(arguments)


def test_every_command_has_examples_and_each_parses():
    assert EXAMPLES.keys() == commands().keys()
    for name, examples in EXAMPLES.items():
        for line, what in examples:
            assert shlex.split(line)[1] == name
            assert what
            parsed(line)


def test_the_first_steps_are_commands():
    steps = [line.strip().split("  ")[0] for line in FIRST_STEPS.splitlines() if "  saeray" in line]
    assert len(steps) >= 5
    for line in steps:
        parsed(line)


@pytest.mark.parametrize("command", [(), *((name,) for name in EXAMPLES)])
def test_help_ends_with_examples_and_fits_a_terminal(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    shown = [line for line, _ in EXAMPLES[command[0]]] if command else FIRST_STEPS.splitlines()
    assert all(line in said for line in shown)
    assert max(map(len, said.splitlines())) <= 100


def test_the_demo_is_the_checkouts_tiny_sweep(tmp_path, capsys):
    assert main(["demo", "--sweep-file"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    mine = load_sweep_file(tmp_path / "mine.yaml")
    tiny = yaml.safe_load((ROOT / "sweeps" / "tiny.yaml").read_text())
    assert here(mine["model_name"]) == str(MODEL)
    assert here(mine["dataset_path"]) == str(MODEL / "text" / "train.parquet")
    apart = {"model_name", "dataset_path", "log_to_wandb", "wandb_project"}
    assert {k: v for k, v in mine.items() if k not in apart} == {
        k: v for k, v in tiny.items() if k not in apart
    }
    assert len(expand(LanguageModelSAERunnerConfig.from_dict(mine))) == 6


def test_fields_are_completed_with_those_of_resources():
    assert fields_named("lr_w") == ["lr_warm_up_steps="]
    assert "resources.harvesters=" in fields_named("resources.")


@pytest.mark.parametrize(
    ("line", "wanted", "unwanted"),
    [
        ("saeray fe", ["fetch", "features"], "sweep"),
        ("saeray sweep --na", ["--name", "--namespace"], "--set"),
        ("saeray sweep x.yaml --set lr_w", ["lr_warm_up_steps="], "seed="),
    ],
)
def test_a_shell_is_told_what_could_come_next(line, wanted, unwanted, tmp_path):
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    code = "import sys; sys.argv[0] = 'saeray'; from saeray.client.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], env=os.environ | asked, timeout=60, check=True)
    found = [word.strip() for word in answer.read_text().split("\n")]
    assert set(wanted) <= set(found)
    assert unwanted not in found
