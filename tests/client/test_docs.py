"""Every block of README, docs and the notebook is run, on the bundled model.

In a folder of their own, page by page, in the process of this test and off the one sweep `six`,
which stands for `results/mine`. What is not run as it stands is in `TABLE`, with the reason.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import matplotlib.pyplot as plt
import pytest
import yaml
from support.blocks import PAGES, SHELLS, blocks_of, commands_of
from support.bundled import ROOT, fields
from support.model_hub import ModelHub, is_the_hub_of_this_process

from saeray.client.cli import main, parser
from saeray.sae.architectures import ARCHITECTURES
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.grid import expand


class Left(NamedTuple):
    """Not run. A command's options are read, Python is compiled."""

    why: str


class Instead(NamedTuple):
    """Run with these arguments after its own, or with these texts in the place of others."""

    why: str
    arguments: tuple[str, ...] = ()
    replaced: tuple[tuple[str, str], ...] = ()
    words: tuple[tuple[str, str], ...] = ()  # whole arguments in the place of others


# What stands in every page for what the test has.
STANDS_FOR = {
    "lr=0.002,l1_coefficient=0.0006": "lr=0.001,l1_coefficient=0.0003",  # SAEs of `six`
    "s3://b/other": "results/other",
}
CLUSTER = Left("needs a cluster; tests/hosts has two machines")
GPT2 = Left("trains on GPT-2 small, which is not here; test_readme.py runs it up to Ray")
LONG = Left("a benchmark of minutes to hours")
DRY = Instead("takes minutes", ("--dry-run",))
ONE = "results/mine/lr=0.001,l1_coefficient=0.0003"
FEW = Instead(
    "one SAE, few tokens; test_feature_pass.py has a whole sweep",
    ("--tokens", "4096"),
    words=(("results/mine", ONE),),
)
WIDE = ("--within", "9")

# Page ("": all) -> what a block of Python holds or a command begins with -> what is done instead.
# The first that fits counts; what fits nothing is run as it stands.
TABLE = {
    "": {
        "sweeps/gpt2_small_l1_lr.yaml": Left("GPT-2 small is not here"),
        "saeray features": FEW,
        "python benchmarks/": LONG,
        "python3 -m venv": Left("makes an environment"),
    },
    "README.md": {
        "language_model_sae_runner(cfg)": GPT2,
        "tune.run(": GPT2,
        "result.best(l0=50)": Instead(
            "L0 is elsewhere after so few steps", replaced=(("l0=50", "l0=50, within=9"),)
        ),
        "saeray best": Instead("L0 is elsewhere after so few steps", WIDE),
        "saeray sweep sweeps/tiny.yaml --set": DRY,
        "saeray sweep my_sweep.yaml --address": CLUSTER,
        "saeray status": CLUSTER,
        "saeray stop": CLUSTER,
        "saeray fetch": CLUSTER,
        "saeray wandb": Left("needs wandb's server; the next one goes into files"),
    },
    "docs/choosing.md": {
        "saeray sweep": DRY,
        "saeray best": Instead("on the sweep that there is", WIDE, (("choosing", "mine"),)),
    },
    "docs/cluster.md": {
        "saeray sweep my_sweep.yaml --dry-run": Instead("as it is"),
        "saeray": CLUSTER,
        'ray.init("ray://': CLUSTER,
    },
    "docs/performance.md": {"python -": Left("twenty seconds of matrix products")},
    "docs/plan.md": {
        "saeray plan sweeps/tiny.yaml --tokens-per-s": Instead("as it is"),
        "saeray plan": Left("measures for 20 seconds"),
    },
    "docs/quickstart.md": {
        "saeray sweep sweeps/tiny.yaml --name mine": Instead(
            "takes a minute and a half; results/mine is there",
            ("--set=training_tokens=16384", "--set=eval_windows=4", "--set=log_to_wandb=false"),
            (("mine", "quick"),),
        ),
        "saeray best": Instead("L0 is elsewhere after so few steps", WIDE),
    },
    "docs/search.md": {"tune.Tuner(": GPT2},
    "docs/synthetic.md": {"saeray sweep": DRY},
}
# L0 falls in training, and so short a one has all its SAEs near 200.
NOTEBOOK = Instead(
    "takes a minute", replaced=(("262_144", "16_384"), ("within=0.5", "within=50.0"))
)


def said_of(page, text):
    """(the key in the table, what it says), or (None, an `Instead` that changes nothing)."""
    for of in (page, ""):
        for key, what in TABLE.get(of, {}).items():
            if text.startswith(key) or (key in text and not key.startswith(("saeray", "python"))):
                return (of, key), what
    return None, Instead("")


@pytest.fixture(scope="module")
def workspace(six, tmp_path_factory):
    """What the pages' commands find where they are: sweep files, and results of two sweeps."""
    here = tmp_path_factory.mktemp("docs")
    for name in ("sweeps", "benchmarks", "saeray"):
        (here / name).symlink_to(ROOT / name)
    for name in ("mine", "other"):
        shutil.copytree(six[1], here / "results" / name)
    return here


@pytest.fixture
def here(workspace, monkeypatch, tmp_path):
    """This process is there, with a hub of its own."""
    hub = ModelHub()
    is_the_hub_of_this_process(hub, monkeypatch, tmp_path)
    monkeypatch.chdir(workspace)
    entered = dict(ARCHITECTURES)
    yield workspace
    hub.close()
    for name in {*ARCHITECTURES} - {*entered}:  # what a page has added
        del ARCHITECTURES[name]


def replaced(text, of):
    for old, new in (*STANDS_FOR.items(), *getattr(of, "replaced", ())):
        text = text.replace(old, new)
    return text


def run_command(command, what, monkeypatch):
    if isinstance(what, Left):
        if command.program == "saeray":
            parser().parse_args(command.arguments)
        elif command.stdin:
            compile(command.stdin, command.line, "exec")
        elif command.arguments[0].endswith(".py"):
            source = (ROOT / command.arguments[0]).read_text()
            for option in (a for a in command.arguments if a.startswith("--")):
                assert f'"{option}"' in source, f"{command.line}: no {option}"
        return
    words = [dict(what.words).get(word, word) for word in command.arguments]
    arguments = [replaced(word, what) for word in (*words, *what.arguments)]
    with monkeypatch.context() as patched:
        for name, value in command.environment.items():
            patched.setenv(name, value)
        if command.program == "saeray":
            assert main(arguments) == 0, command.line
            return
        done = subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            input=command.stdin,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, f"{command.line}\n{done.stderr[-3000:]}"


def run_python(text, what, names):
    if isinstance(what, Left):
        compile(text, "a block of the page", "exec")
        return
    text = replaced(text, what)
    exec(compile(text, text, "exec"), names)


def check_yaml(text, into):
    """Its fields, beside those of a sweep on the bundled model; written where it says its name."""
    given = yaml.safe_load(text)
    wide = {"training_tokens": 300_000_000, "d_in": 128}
    expand(resolve(LanguageModelSAERunnerConfig.from_dict(fields() | wide | given)))
    named = re.match(r"# (\S+\.yaml)\b", text)
    if named is not None:
        (into / named[1]).write_text(text)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)])
def test_the_blocks_of(page, here, monkeypatch):
    names = {"__name__": "docs"}
    for block in blocks_of(page):
        if block.language == "python":
            run_python(block.text, said_of(page, block.text)[1], names)
        elif block.language == "yaml":
            check_yaml(block.text, here)
        elif block.language in SHELLS:
            for command in commands_of(block):
                run_command(command, said_of(page, command.line)[1], monkeypatch)
        else:
            assert block.language in ("mermaid", "json"), block


@pytest.mark.slow
@pytest.mark.ci
def test_the_cells_of_the_notebook(here, monkeypatch):
    def chosen_by_tune(*_, **__):
        raise AssertionError("of a notebook it would clear the cell's output, and the live view")

    monkeypatch.setattr("ray.tune.tune._detect_reporter", chosen_by_tune)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    plt.switch_backend("Agg")
    notebook = json.loads((ROOT / "examples" / "tiny.ipynb").read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            run_python("".join(cell["source"]), NOTEBOOK, names)
    assert names["result"].ok and len(names["frame"]) == 4
    assert int((names["latents"] > 0).sum()) > 0
    assert (ROOT / "examples" / "tiny.ipynb").stat().st_size < 100_000


def anchors(text):
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_leads_to_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        to = (ROOT / page).parent / path if path else ROOT / page
        assert to.exists(), path
        assert not anchor or anchor in anchors(to.read_text(encoding="utf-8")), f"{path}#{anchor}"
    named = r"`((?:tests|saeray|benchmarks|sweeps|docs|examples)/[\w./-]+)`"
    for path in re.findall(named, text):
        assert (ROOT / path).exists(), path


def test_the_table_has_nothing_that_no_page_has():
    used = set()
    for page in PAGES:
        for block in blocks_of(page):
            texts = [block.text] if block.language == "python" else []
            if block.language in SHELLS:
                texts = [command.line for command in commands_of(block)]
            used |= {said_of(page, text)[0] for text in texts}
    assert {(page, key) for page, of in TABLE.items() for key in of} <= used
