"""The code blocks of a page of docs, run in their order by a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

RUN = """
import shlex, sys
from saeray.client.cli import main
from support.blocks import blocks_of

names = {}
for language, text in blocks_of(sys.argv[1]):
    for old, new in zip(sys.argv[2::2], sys.argv[3::2]):
        text = text.replace(old, new)
    if language == "python":
        exec(compile(text, text, "exec"), names)
        continue
    for line in text.splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
"""


def blocks_of(page):
    """(language, text) of each block; one of commands has no language."""
    text = Path(page).read_text(encoding="utf-8")
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_blocks(page, where, replaced, **environment):
    """Runs all of a page's blocks in a folder, with these texts replaced; what was printed."""
    pairs = [text for pair in replaced.items() for text in pair]
    tests = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (tests, os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(page), *pairs],
        cwd=where,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
