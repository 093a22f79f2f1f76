"""`saeray sweep FILE.yaml`, `saeray status`, `saeray fetch SWEEP DIR`, …: the command line.

Exit codes: 0 every SAE finished (or was stopped by its scheduler), 1 some failed or were
interrupted, 2 bad input, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from saeray.client.ending import Ended, end_signals
from saeray.client.features_command import add_features
from saeray.client.pages import add_report
from saeray.client.sharing_commands import add_commands
from saeray.errors import ConfigError, SaerayError, printable
from saeray.files.frontier import BAND
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.points import with_paths
from saeray.version import __version__

ADDRESSES = "of a Ray cluster: ray://HOST:10001, http://HOST:8265, or on a node of it auto"


def load_sweep_file(path: str | os.PathLike[str], overrides: list[str] = []) -> dict[str, Any]:  # noqa: B006
    """The flat YAML of a sweep, with `key=value` overrides (values are YAML too).

    Paths of the model and the dataset may be relative to the file.

    Raises:
        ConfigError: no such file, not a mapping, or not YAML.
    """
    file = Path(path)
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: `field: value` lines are wanted, at the top level.")
    if "saes" in data and isinstance(data.get("config"), dict):
        data = data["config"]  # as a sweep has written it into its folder
    for override in overrides:
        key, found, text = override.partition("=")
        if not found:
            raise ConfigError(f"--set {override!r}: key=value is wanted.")
        target, *rest = key.split(".")
        value = yaml.safe_load(text)
        if rest:
            inner = data.setdefault(target, {})
            if len(rest) > 1 or not isinstance(inner, dict):
                raise ConfigError(f"--set {override!r}: no such field.")
            inner[rest[0]] = value
        else:
            data[target] = value
    return data | with_paths(data, lambda value: found_beside(file, value))


def found_beside(file: Path, value: Any) -> Any:
    """A path, or each of a list, that lies beside the sweep file; anything else as it is."""
    if isinstance(value, list):
        return [found_beside(file, one) for one in value]
    if isinstance(value, str) and not Path(value).expanduser().is_absolute():
        beside = file.parent / value
        if beside.exists():
            return str(beside.resolve())
    return value


def sweep_command(arguments: argparse.Namespace) -> int:
    if arguments.resume is not None:
        return resume_command(arguments)
    if arguments.file is None:
        raise ConfigError("a sweep file is wanted: saeray sweep FILE.yaml (or --resume DIR).")
    data = load_sweep_file(arguments.file, arguments.set)
    config = LanguageModelSAERunnerConfig.from_dict(data, source=arguments.file)
    if arguments.dry_run:
        from saeray.client.dry_run import dry_run

        return dry_run(config, arguments.address, arguments.namespace)
    from saeray.client.runner import sweep

    named = arguments.name or config.name
    name = named or f"{Path(arguments.file).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    result = sweep(
        config,
        name=name,
        storage_path=arguments.storage_path,
        address=arguments.address,
        namespace=arguments.namespace,
        given=as_given(arguments.file, arguments.set),
    )
    print(printable(result.summary(terminal_width())))
    return 0 if result.ok else 1


def as_given(file: str, overrides: list[str]) -> str:
    """The text of a sweep file, under what the command line has changed of it."""
    lines = [f"# saeray sweep {file}"] + [f"#   --set {shlex.quote(text)}" for text in overrides]
    return "\n".join([*lines, Path(file).read_text(encoding="utf-8")])


def resume_command(arguments: argparse.Namespace) -> int:
    given = {
        "FILE.yaml": arguments.file,
        "--name": arguments.name,
        "--storage-path": arguments.storage_path,
        "--dry-run": arguments.dry_run,
    }
    for option, value in given.items():
        if value:
            raise ConfigError(
                f"--resume goes on with the sweep in {arguments.resume} as it is; {option} can't "
                "be given beside it."
            )
    from saeray.client.changes import changes_from
    from saeray.client.runner import resume

    result = resume(
        arguments.resume,
        address=arguments.address,
        namespace=arguments.namespace,
        changes=changes_from(arguments.set),
    )
    print(printable(result.summary(terminal_width())))
    return 0 if result.ok else 1


def terminal_width() -> int | None:
    """None: nobody reads along, and what stands in a file or goes to a program has whole names."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def status_command(arguments: argparse.Namespace) -> int:
    from saeray.client.connect import chosen, connected, is_jobs

    address = chosen(arguments.address)
    if is_jobs(address):
        from saeray.client.jobs import command_as_job

        assert address is not None
        return command_as_job(["status", *(["--json"] if arguments.json else [])], address)
    with connected(address or "auto"):
        from saeray.client.status import as_json, sweeps_of_cluster, table

        listed = sweeps_of_cluster()
        print(as_json(listed) if arguments.json else printable(table(listed)))
    return 0


def stop_command(arguments: argparse.Namespace) -> int:
    from saeray.client.connect import chosen, connected, is_jobs

    address = chosen(arguments.address)
    if is_jobs(address):
        from saeray.client.jobs import command_as_job

        assert address is not None
        return command_as_job(["stop", arguments.sweep], address)
    with connected(address or "auto"):
        from saeray.client.status import stop
        from saeray.cluster.registry import find_record

        record = find_record(arguments.sweep)
        print(stop(record))
    return 0


def fetch_command(arguments: argparse.Namespace) -> int:
    from saeray.client.connect import chosen, connected
    from saeray.files.fetch import fetch_folder
    from saeray.files.storage import Folder

    target = Folder.at(arguments.directory)
    if "://" in arguments.sweep:
        source = Folder.at(arguments.sweep, "SWEEP")
        if "sweep.yaml" not in source.names():
            raise ConfigError(f"{source.uri}: there is no sweep.yaml, so no sweep to fetch.")
        fetch_folder(source, target, arguments.checkpoints)
        return 0
    with connected(chosen(arguments.address) or "auto"):
        from saeray.actors.head_folder import seen_from_here
        from saeray.cluster.registry import find_record

        record = find_record(arguments.sweep)
        fetch_folder(seen_from_here(record.folder), target, arguments.checkpoints)
    return 0


def best_command(arguments: argparse.Namespace) -> int:
    from saeray.client.choose import best_command

    return best_command(arguments)


def compare_command(arguments: argparse.Namespace) -> int:
    from saeray.client.choose import compare_command

    return compare_command(arguments)


def wandb_command(arguments: argparse.Namespace) -> int:
    from saeray.files.storage import Folder
    from saeray.files.wandb_runs import send_whole

    sent = send_whole(Folder.at(arguments.directory, "DIR"))
    print(f"{len(sent)} wandb runs, each one whole: {', '.join(sent)}")
    return 0


def fields_command(arguments: argparse.Namespace) -> int:
    from saeray.spec.fields import as_markdown, described, matching

    print(as_markdown() if arguments.markdown else described(matching(arguments.word)), end="")
    print(end="" if arguments.markdown else "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="saeray", description="Sweeps of sparse autoencoders on Ray."
    )
    top.add_argument("--version", action="version", version=f"saeray {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("sweep", help="train the grid of SAEs that a YAML file describes")
    run.add_argument("file", metavar="FILE.yaml", nargs="?")
    run.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with an interrupted sweep: its folder, a path or s3://…, gs://…; or, on a "
        "cluster, its name",
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a field; a list is a grid axis: --set 'lr=[1e-4, 4e-4]'; with --resume of "
        "resources.…, training_tokens (upward)",
    )
    run.add_argument("--name", help="of the sweep; default: the file's name and the time")
    run.add_argument("--storage-path", help="where its folder goes: a path or s3://…, gs://…")
    run.add_argument("--address", help=f"{ADDRESSES}; default: RAY_ADDRESS, or this machine")
    run.add_argument("--namespace", help="Ray's; default: saeray")
    run.add_argument("--dry-run", action="store_true", help="check everything, print the plan")
    run.set_defaults(command=sweep_command)

    status = commands.add_parser("status", help="the sweeps of a cluster, running and finished")
    status.add_argument("--address", help=f"{ADDRESSES}; default: RAY_ADDRESS, or this node's")
    status.add_argument("--json", action="store_true", help="for other programs")
    status.set_defaults(command=status_command)

    stop = commands.add_parser("stop", help="end a running sweep; what is trained is saved")
    stop.add_argument("sweep", metavar="SWEEP", help="its name, or NAMESPACE/NAME")
    stop.add_argument("--address", help=f"{ADDRESSES}; default: RAY_ADDRESS, or this node's")
    stop.set_defaults(command=stop_command)

    fetch = commands.add_parser("fetch", help="bring a sweep's results home from a cluster")
    fetch.add_argument(
        "sweep", metavar="SWEEP", help="its name, NAMESPACE/NAME, or the URI of its folder"
    )
    fetch.add_argument("directory", metavar="DIR", help="where to: a local folder")
    fetch.add_argument("--address", help=f"{ADDRESSES}; default: RAY_ADDRESS, or this node's")
    fetch.add_argument("--checkpoints", action="store_true", help="them, too")
    fetch.set_defaults(command=fetch_command)

    best = commands.add_parser("best", help="the SAE of a sweep to take at an L0")
    best.add_argument("sweep", metavar="SWEEP", help="its folder: a path or s3://…, gs://…")
    best.add_argument("--l0", type=float, required=True, help="mean active features per token")
    best.add_argument(
        "--by", default="fvu", help="the figure: fvu (default), ce_loss_score, kl_div …"
    )
    best.add_argument(
        "--within", type=float, default=BAND, help="how far off its L0 may be (0.2: a fifth)"
    )
    best.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="only SAEs with this value: --where hook_point=blocks.2.hook_resid_pre",
    )
    best.add_argument("--json", action="store_true", help="its row, for other programs")
    best.set_defaults(command=best_command)

    compare = commands.add_parser("compare", help="one frontier of several sweeps")
    compare.add_argument("sweeps", metavar="SWEEP", nargs="+", help="a folder: a path or s3://…")
    compare.add_argument("--all", action="store_true", help="SAEs that are on no frontier, too")
    compare.add_argument(
        "--stability",
        action="store_true",
        help="compute PW-MCC between seeds where it is missing, however long it takes",
    )
    compare.set_defaults(command=compare_command)

    add_report(commands)
    add_features(commands, ADDRESSES)

    wandb = commands.add_parser(
        "wandb", help="send a sweep to wandb: each SAE's whole metrics.jsonl as one run"
    )
    wandb.add_argument("directory", metavar="DIR", help="the sweep's folder: a path or s3://…")
    wandb.set_defaults(command=wandb_command)

    add_commands(commands)

    fields = commands.add_parser("fields", help="what the fields of a sweep file mean")
    fields.add_argument("word", metavar="WORD", nargs="?", default="", help="in a name or text")
    fields.add_argument("--markdown", action="store_true", help="all of them, as docs/config.md")
    fields.set_defaults(command=fields_command)
    return top


def main(arguments: list[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    end_signals()
    try:
        return parsed.command(parsed)
    except ConfigError as error:
        print(printable(f"saeray: {error}"), file=sys.stderr)
        return 2
    except SaerayError as error:
        print(printable(f"saeray: {error}"), file=sys.stderr)
        return 1
    except Ended as error:
        print(printable(f"saeray: {error}"), file=sys.stderr)
        return 130
    except KeyboardInterrupt as left:
        if left.args:  # the sweep's name: it was left running
            print(
                f"saeray: {left.args[0]} goes on; `saeray status` looks at it, `saeray sweep "
                f"--resume {left.args[0]}` joins it, `saeray fetch {left.args[0]} DIR` brings its "
                "results home (with the same --address).",
                file=sys.stderr,
            )
            return 0
        print("saeray: interrupted.", file=sys.stderr)
        return 130
