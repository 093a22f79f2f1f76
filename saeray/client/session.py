"""One sweep on the Ray instance that this process is connected to: from its SAEs to its results.

A thin layer over `tune.run(SAETrial, ...)`: it names the sweep, tells its roster which SAEs to
expect, and has it watched while Tune runs. Where it runs is others' business: `runner` calls it
here, `driver` in an actor on a cluster.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from saeray.client.features_at_end import left_at_end, make_at_end
from saeray.client.result import SweepResult
from saeray.client.speed import Times
from saeray.client.status_file import StatusFile
from saeray.client.trials import run_trials
from saeray.cluster.cost import write_down
from saeray.errors import ConfigError, SaerayError, bad_value, printable
from saeray.files.seeds import add_stability
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.files.wandb_runs import CLOSE_SECONDS
from saeray.lm.hub import portable
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import SAE
from saeray.spec.messages import ENDS, SAERow, SweepStatus
from saeray.spec.points import with_paths

GIVEN = "given.yaml"  # in the sweep's folder: the sweep file, with its comments
STABILITY_SECONDS = 60.0  # of a core, at a sweep's end; more is for `saeray compare --stability`


def run(
    saes: list[SAE],
    folder: Folder,
    name: str,
    scheduler: Any,
    live: bool,
    ends_ray: bool,
    resuming: bool = False,
    versions: Mapping[str, Any] | None = None,
    watched: Callable[[SweepStatus], None] | None = None,
    began: float | None = None,
) -> SweepResult:
    """One sweep on the Ray instance this process is connected to.

    ends_ray: Ray ends with it. versions: what the sweep was begun with, if not here. watched: is
    told how it stands, about once a second. began: time.time() of the command, if before.
    """
    import ray

    from saeray.actors import waiting
    from saeray.actors.head_folder import seen_from_here
    from saeray.client.live import LiveView

    began, limit = began or time.time(), saes[0].config.wait_limit_s
    versions = versions or provenance()
    roster, marker = begun(saes, folder, name, limit, resuming, versions)
    folder = seen_from_here(folder.uri, marker)
    note = StatusFile.wanted()
    view = LiveView(
        lambda: waiting.ask(roster.status.remote, limit, "roster"),
        live,
        watched or (note.write if note is not None else None),
    )
    view.update()
    trained_before = view.status.trained_tokens
    try:
        with view:
            # Trials only wait for reports, and a process for each takes seconds of a few cores.
            view.wait_for_training()
            if view.status.error is None:
                ended = {row.name for row in view.status.rows if row.state in ENDS}
                left = [s for s in saes if s.name not in ended]
                run_trials(left, folder, name, scheduler, view.all_ended)
                view.wait_for_end(limit)
    finally:
        bad_input = view.status.error is not None
        warnings = waiting.ask(
            lambda: roster.close.remote(wait=not (ends_ray and bad_input)),
            limit + CLOSE_SECONDS,
            "roster",
        )
        ray.kill(roster)
    status = view.status
    status.warnings += [w for w in warnings if w not in status.warnings]
    if status.error is not None:
        if status.bad_input and not resuming:
            forget_refused(folder)
        raise (ConfigError if status.bad_input else SaerayError)(status.error)
    rows, left_out = add_stability(folder, SweepFolder(folder, name).read_rows(), STABILITY_SECONDS)
    status.warnings += left_out
    times = Times(began, time.time(), trained_before)
    prevented = write_down(folder, status, times)
    status.warnings += [prevented] if prevented else []

    def tell(text: str) -> None:
        status.phase = f"pages of features: {text}"
        if live:
            print(printable(text), file=sys.stderr, flush=True)
        for look in (watched, note.write if note is not None else None):
            if look is not None:
                look(status)

    prevented = make_at_end(folder, saes[0].config, rows, tell)
    status.warnings += [prevented] if prevented else []
    if note is not None:
        note.write(status, rows, times)
    return SweepResult(name, folder, rows, status, times)


def forget_refused(folder: Folder) -> None:
    """A sweep whose input was refused before anything was spent leaves no folder behind."""
    spent = ("checkpoints/", "final/", "metrics.jsonl")
    if not any(part in name for name, size in folder.files().items() for part in spent if size):
        folder.delete()


def begun(
    saes: list[SAE],
    folder: Folder,
    name: str,
    limit_s: float,
    resuming: bool,
    versions: Mapping[str, Any],
) -> tuple[Any, str]:
    """The sweep's roster, told what to train, and what tells the disk it writes to."""
    from saeray.actors import waiting
    from saeray.cluster.roster import find_or_create

    configs = {s.name: s.config.to_dict() for s in saes}
    return waiting.one_that_takes(
        lambda roster: roster.begin.remote(configs, versions, resuming),
        lambda: find_or_create(name, folder.uri),
        limit_s,
        f"the roster of {name}",
    )


def provenance() -> dict[str, Any]:
    """What the sweep was run with, for sweep.yaml."""
    from importlib.metadata import version

    def commit() -> str | None:
        here = Path(__file__).resolve().parent
        try:
            done = subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    packages = ("saeray", "ray", "torch", "transformer_lens", "transformers", "datasets")
    return {**{name: version(name) for name in packages}, "git_commit": commit()}


def refuse_existing(folder: Folder, name: str) -> None:
    if folder.names():
        raise bad_value(
            "name",
            name,
            f"{folder.uri} is there already; choose another name, or go on with it by --resume.",
        )


def ask_for(
    folder: Folder,
    asked: LanguageModelSAERunnerConfig,
    saes: list[SAE],
    given: str | None = None,
) -> dict[str, Any]:
    """Writes down what a new sweep shall be: from now on it can be resumed. Answers `provenance`.

    asked: its config as it was given. given: the text of its sweep file, where there is one.

    Raises:
        ConfigError: something is there already.
    """
    refuse_existing(folder, folder.name)
    versions = provenance()
    SweepFolder(folder, folder.name).write_sweep_yaml(
        {s.name: s.config for s in saes}, versions, {}, given_fields(asked)
    )
    if given is not None:
        folder.write(GIVEN, given.encode())
    return versions


def given_fields(config: LanguageModelSAERunnerConfig) -> dict[str, Any]:
    """The fields of a config that differ from their defaults, as a sweep file has them.

    Without its name, so that the sweep file can be run again.
    """
    data = config.to_dict()
    for f in fields(config):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if is_dataclass(default) and not isinstance(default, type):
            default = asdict(default)
            data[f.name] = {k: v for k, v in data[f.name].items() if v != default[k]} or default
        if data[f.name] == default or f.name == "name":
            del data[f.name]
    return data


def saes_of(place: Folder) -> list[SAE]:
    """The SAEs of a sweep, as its sweep.yaml has them."""
    configs = SweepFolder(place, place.name).read_configs()
    return [SAE(name, config) for name, config in configs.items()]


def done_already(place: Folder) -> SweepResult | None:
    """The results of a sweep of which nothing is left to do."""
    files = SweepFolder(place, place.name)
    saes = saes_of(place)
    known = files.known([s.name for s in saes])
    if not all(k.state in ENDS for k in known.values()):
        return None
    rows = [
        SAERow(s.name, k.state, k.step, s.config.steps, k.n_training_tokens, k.metrics, k.error)
        for s, k in ((s, known[s.name]) for s in saes)
    ]
    status = SweepStatus(rows, "done already")
    found, status.warnings = add_stability(place, files.read_rows(), STABILITY_SECONDS)
    if left_at_end(place, saes[0].config, found) is not None:
        status.warnings.append(f"pages of features are not made yet: saeray features {place.uri}")
    return SweepResult(place.name, place, found, status)


def with_absolute_inputs(config: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """Model and text, where they are files of this machine, as other processes find them."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return config.replace(**with_paths(values, absolute))


def absolute(path: Any) -> Any:
    """A path that is there, as other processes find it; anything else as it is. Of a list, each."""
    if isinstance(path, list):
        return [absolute(one) for one in path]
    if isinstance(path, str) and "://" not in path:
        here = Path(path).expanduser()
        if here.exists() or (here.parent / "sweep.yaml").exists():  # SWEEP/SAE
            return portable(here)
    return path
