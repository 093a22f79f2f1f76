"""CONTRIBUTING.md names what there is."""

import re

from support.bundled import ROOT
from test_floors import FLOORS

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PLACES = (
    ROOT,
    ROOT / "saeray",
    ROOT / "saeray" / "spec",
    ROOT / "saeray" / "sae" / "architectures",
)


def test_its_files_and_folders_are_there():
    quoted = re.findall(r"`([\w./-]+)`", TEXT)
    paths = {q for q in quoted if "/" in q or q.endswith((".py", ".md", ".txt", ".toml"))}
    paths -= {q for q in paths if "NAME" in q or q.endswith("…")}
    assert len(paths) > 30
    gone = [
        p for p in sorted(paths)
        if not any((place / end).exists() for place in PLACES for end in (p, f"{p}.py"))
        and not p.startswith(("eval/", "metrics/"))
    ]  # fmt: skip
    assert gone == []


def test_its_floors_are_those_that_are_held():
    (line,) = [line for line in TEXT.splitlines() if line.startswith("    models <")]
    assert tuple(line.split(" < ")) == ("    models", *FLOORS[1:])
