"""The house: each folder of `saeray/` is a floor, and imports go down only, in no circle.

The lower floors bring in neither Ray nor a language model.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import saeray

PACKAGE = Path(saeray.__file__).parent

# From the ground up: a module may use what is before its own floor, and its own floor.
FLOORS = (
    "models", "sae", "spec", "lm", "text", "files", "report", "actors", "stream", "cluster",
    "client",
)  # fmt: skip
GROUND = ("saeray.errors", "saeray.version")  # which all of them may use
ROOF = ("saeray", "saeray.__main__")  # which may use all of them, and nobody uses


def modules():
    """Every module's name and syntax tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("saeray", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree, known):
    """The modules of ours that a module imports anywhere in it, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "saeray":
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written from the top"
            if (node.module or "").split(".")[0] == "saeray":
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in known else node.module, node.lineno


def wrong(name, wanted):
    """Why a module must not import another; None if it may."""
    if name in ROOF or wanted in GROUND:
        return None
    if wanted in ROOF:
        return "is the roof"
    if name in GROUND:
        return "is above the ground"
    here, there = name.split(".")[1], wanted.split(".")[1]
    return "is a higher floor" if FLOORS.index(there) > FLOORS.index(here) else None


def test_every_folder_and_file_has_its_floor():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(FLOORS)
    loose = {f"saeray.{p.stem}".removesuffix(".__init__") for p in PACKAGE.glob("*.py")}
    assert loose == {*GROUND, *ROOF}


def test_imports_go_down_only():
    trees = dict(modules())
    faults = [
        f"{name}, line {line}: {wanted} {why}"
        for name, tree in trees.items()
        for wanted, line in imports(tree, trees)
        if (why := wrong(name, wanted))
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from saeray.client import cli", "saeray.client.cli is a higher floor"),
        ("def f():\n    import saeray.cluster.roster", "saeray.cluster.roster is a higher floor"),
        ("from saeray import sweep", "saeray is the roof"),
        ("from saeray.spec.config import digest", None),
        ("from saeray.errors import ConfigError", None),
    ],
)
def test_an_import_that_goes_up_would_be_found(source, said):
    known = dict(modules())
    ((wanted, _),) = imports(ast.parse(source), known)
    why = wrong("saeray.stream.buffer", wanted)
    assert (why and f"{wanted} {why}") == said


class AtRunTime(ast.NodeTransformer):
    """Drops what only a type checker reads."""

    def visit_If(self, node):
        test = node.test
        return None if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING" else node


def test_no_two_modules_import_each_other():
    trees = {name: AtRunTime().visit(tree) for name, tree in modules()}
    graph = {name: {w for w, _ in imports(t, trees)} - {name} for name, t in trees.items()}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, and names them


HEAVY = ("ray", "transformer_lens", "transformers", "wandb", "datasets")


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (". spec.config spec.grid spec.plan spec.order spec.placement", (*HEAVY, "torch")),
        ("client.cli client.runner client.session client.choose", (*HEAVY, "torch")),
        ("text.tokens text.dataset lm.hub", ("ray", "torch", "wandb")),
        ("files.tracking files.results files.sweep_folder files.cache", ("ray", "torch")),
        ("sae sae.trainer", HEAVY),
        ("lm.model lm.evaluate", ("ray", "wandb")),
        ("files.checkpoint", ("ray", "wandb", "transformers")),
        ("report.page report.features report.features_export", (*HEAVY, "torch")),
        (
            "cluster.trial cluster.roster stream.buffer stream.launch client.driver",
            ("torch", "transformer_lens", "wandb"),
        ),
    ],
)
def test_importing_modules_leaves_the_heavy_ones_out(names, absent):
    ours = ", ".join(f"saeray.{name}".rstrip(".") for name in names.split())
    code = f"import sys, {ours}; print(*[m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
