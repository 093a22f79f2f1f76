"""The code blocks of README and docs, and the commands that stand in them."""

import re
import shlex
from typing import NamedTuple

from support.bundled import ROOT

PAGES = sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
SHELLS = ("", "bash", "sh", "console")  # languages of blocks of commands
COMMAND = re.compile(r"((?:[A-Z_]+=\S+ +)*)(saeray|python3?)\s")


class Block(NamedTuple):
    language: str
    text: str


class Command(NamedTuple):
    environment: dict[str, str]
    program: str  # saeray or python
    arguments: list[str]
    line: str  # as it stands there
    stdin: str = ""


def blocks_of(page):
    """Of a page by its path in the repository, as they follow each other."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(*each) for each in found]


def commands_of(block):
    """saeray's and Python's; where some lines begin with a prompt, the others are output."""
    lines = re.sub(r" *\\\n\s*", " ", block.text).splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found, rest = [], iter(lines)
    for line in rest:
        begun = COMMAND.match(line)
        if begun is None:
            continue
        environment = dict(one.split("=", 1) for one in begun[1].split())
        end = re.search(r" <<'(\w+)'$", line)
        stdin = "" if end is None else "".join(f"{x}\n" for x in iter(lambda: next(rest), end[1]))
        words = shlex.split(line[: end.start() if end else None], comments=True)
        arguments = words[len(environment) + 1 :]
        found.append(Command(environment, begun[2], arguments, line, stdin))
    return found
