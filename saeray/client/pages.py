"""`saeray report`: the page of a sweep, or of several, made (anew) from their folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeray.errors import ConfigError, SaerayError, bad_value

if TYPE_CHECKING:
    from saeray.files.storage import Folder


def add_report(commands: Any) -> None:
    """The command and its arguments, to argparse's subparsers."""
    report = commands.add_parser(
        "report", help="write report.html: a sweep's frontier, curves and costs, to look at"
    )
    report.add_argument(
        "sweeps",
        metavar="DIR",
        nargs="+",
        help="a sweep's folder, finished or not: a path or s3://…; of several one page",
    )
    report.add_argument(
        "--output",
        metavar="FILE",
        help="default: report.html in the sweep's folder; of several sweeps, in this one",
    )
    report.set_defaults(command=report_command)


def report_command(arguments: argparse.Namespace) -> int:
    from saeray.files.storage import Folder
    from saeray.report.report import FILE, write_report

    folders = [Folder.at(place, "DIR") for place in arguments.sweeps]
    if len({folder.uri for folder in folders}) < len(folders):
        raise ConfigError("a sweep stands in the report twice.")
    target, name = folders[0], FILE
    if arguments.output is not None:
        target, name = output(arguments.output)
    elif len(folders) > 1:
        target = Folder.at(Path.cwd())
    try:
        size = write_report(folders, target, name)
    except OSError as error:
        raise SaerayError(
            f"{(target / name).uri}: can't be written ({error}); --output FILE writes it elsewhere."
        ) from None
    print(f"{(target / name).uri}: {size / 1e6:.1f} MB")
    return 0


def output(given: str) -> tuple[Folder, str]:
    """The folder and the name of a file to be written.

    Raises:
        ConfigError: it is no name of a page.
    """
    from saeray.files.storage import Folder

    place, _, name = given.rpartition("/")
    if not name.endswith((".html", ".htm")):
        raise bad_value("--output", given, "a file that ends with .html.")
    return Folder.at(place or ("/" if given.startswith("/") else Path.cwd()), "--output"), name
