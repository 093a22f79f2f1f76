"""`saeray push`, `pull` and `export` on the command line."""

from __future__ import annotations

import argparse
from typing import Any

from saeray.errors import printable


def export_command(arguments: argparse.Namespace) -> int:
    from saeray.client.sharing import export

    for name, folder in export(arguments.sweep, arguments.format, arguments.output).items():
        print(printable(f"{name}: {folder}"))
    return 0


def push_command(arguments: argparse.Namespace) -> int:
    from saeray.client.sharing import push

    private = True if arguments.private else None
    url = push(arguments.sweep, arguments.repo, private=private, license=arguments.license)
    print(printable(url))
    return 0


def pull_command(arguments: argparse.Namespace) -> int:
    from saeray.client.sharing import pull

    print(printable(pull(arguments.repo, arguments.directory)))
    return 0


def add_commands(commands: Any) -> None:
    """To the command line's parsers."""
    sweep = dict(metavar="SWEEP[/SAE]", help="a sweep's folder, or one of its SAEs")
    pushing = commands.add_parser("push", help="publish SAEs on the Hugging Face hub")
    pushing.add_argument("sweep", **sweep)
    pushing.add_argument("repo", metavar="REPO", help="user/repo; made where there is none")
    pushing.add_argument("--private", action="store_true", help="only you can see it")
    pushing.add_argument("--license", metavar="ID", help="for the card: mit, apache-2.0, …")
    pushing.set_defaults(command=push_command)

    pulling = commands.add_parser("pull", help="bring SAEs from the Hugging Face hub")
    pulling.add_argument("repo", metavar="REPO", help="user/repo, user/repo@revision or …/SAE")
    pulling.add_argument(
        "directory", metavar="DIR", nargs="?", help="a new folder; default: REPO's name"
    )
    pulling.set_defaults(command=pull_command)

    exporting = commands.add_parser("export", help="SAEs in another package's format")
    exporting.add_argument("sweep", **sweep)
    exporting.add_argument(
        "--format", required=True, help="sae_lens, dictionary_learning or saebench"
    )
    exporting.add_argument(
        "--output", metavar="DIR", help="default: export/FORMAT in the sweep's folder"
    )
    exporting.set_defaults(command=export_command)
