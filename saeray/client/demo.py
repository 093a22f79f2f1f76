"""`saeray demo`: a sweep of minutes on the bundled model and text, wherever the package is."""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path
from typing import Any

import yaml

import saeray.models
from saeray.errors import printable
from saeray.spec.config import LanguageModelSAERunnerConfig

FILE = Path(saeray.models.__file__).parent / "demo.yaml"


def add_demo(commands: Any) -> None:
    """The command and its arguments, to argparse's subparsers."""
    demo = commands.add_parser("demo", help="train 6 SAEs on the bundled model: about 2 minutes")
    demo.add_argument(
        "directory",
        metavar="DIR",
        nargs="?",
        default="results",
        help="where the sweep's folder goes: a path or s3://…; default: results",
    )
    demo.add_argument(
        "--sweep-file", action="store_true", help="print its sweep file, to begin with, and end"
    )
    demo.set_defaults(command=demo_command)


def demo_command(arguments: argparse.Namespace) -> int:
    text = FILE.read_text(encoding="utf-8")
    if arguments.sweep_file:
        print(text, end="")
        return 0
    from saeray.client.runner import sweep

    config = LanguageModelSAERunnerConfig.from_dict(yaml.safe_load(text), source=str(FILE))
    result = sweep(
        config,
        name=f"demo-{time.strftime('%Y%m%d-%H%M%S')}",
        storage_path=arguments.directory,
    )
    print(printable(result.summary()))
    if not result.ok:
        return 1
    print(printable(next_steps(result.folder.uri)))
    return 0


def next_steps(folder: str) -> str:
    """What to do with the sweep in `folder`, as commands."""
    here = shlex.quote(folder)
    return "\n".join(
        (
            f"saeray best {here} --l0 30          # the SAE to take, and how it is loaded",
            f"saeray features {here}              # what makes each feature fire, as pages",
            "saeray demo --sweep-file > mine.yaml  # a sweep file of your own to begin with",
        )
    )
