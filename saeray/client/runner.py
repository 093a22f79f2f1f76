"""The user's side in Python: `sweep(config)`, `resume(folder)` and the guide's
`language_model_sae_runner(cfg)`.

They refuse bad input and say where the sweep runs: here (`session`), or on a cluster that this
process is outside of, in an actor (`driver`) or as a job (`jobs`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saeray.client.changes import checked, refuse_running
from saeray.client.connect import LOCAL, chosen, connected, is_jobs, is_outside
from saeray.client.ending import driving
from saeray.client.features_at_end import left_at_end, make_at_end
from saeray.client.result import SweepResult
from saeray.client.session import (
    ask_for,
    done_already,
    forget_refused,
    run,
    saes_of,
    with_absolute_inputs,
)
from saeray.errors import ConfigError, SaerayError, bad_value, printable
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig, grid_axes, resolve
from saeray.spec.grid import expand
from saeray.spec.messages import DONE, STOPPED
from saeray.spec.scheduler import refuse_takeover

if TYPE_CHECKING:
    from saeray.sae.architectures.base import SAE


def sweep(
    config: LanguageModelSAERunnerConfig | Mapping[str, Any],
    *,
    name: str | None = None,
    storage_path: str | os.PathLike[str] | None = None,
    address: str | None = None,
    namespace: str | None = None,
    scheduler: Any = None,
    live: bool = True,
    given: str | None = None,
) -> SweepResult:
    """Trains the grid that `config` spans (a list in a field is an axis), one LM pass for all.

    Args:
        config: the guide's fields, as an object or flat data.
        name: of the sweep; its results stand in `<storage_path>/<name>`. Default: derived from the
            model, the hook point and the time.
        storage_path: local path or URI; default: the config's. From outside a cluster (`ray://`) a
            relative path is one below the head's home directory, and what is kept there is
            fetched to the same path here in the end; an absolute one is the cluster's alone.
        address: of a Ray cluster; default: RAY_ADDRESS, or a cluster that runs on this machine, or
            this machine alone (`local`: in any case). `ray://HOST:10001` from outside the cluster,
            `http://HOST:8265` for its job server.
        namespace: Ray's; sweeps of different ones know nothing of each other.
        scheduler: a Ray Tune scheduler; default: the config's, or FIFO. Use `n_training_tokens` as
            time_attr.
        live: draw a table while it runs (plain lines when not a terminal).
        given: the text of a sweep file, to be kept as given.yaml in the sweep's folder.

    Raises:
        ConfigError: bad input, before anything is spent.
    """
    began = time.time()
    if not isinstance(config, LanguageModelSAERunnerConfig):
        config = LanguageModelSAERunnerConfig.from_dict(config)
    config = config.replace(
        name=name or config.name or default_name(config),
        storage_path=str(storage_path or config.storage_path or config.checkpoint_path),
    )
    refuse_takeover(scheduler)
    if scheduler is not None and config.scheduler is not None:
        raise ConfigError("scheduler is given twice: in the config and as an argument.")
    asked, config = config, resolve(config)
    expand(config)  # what is wrong with it is said before anything is started
    if config.activation_cache is not None:
        Folder.at(config.activation_cache, "activation_cache")
    address = chosen(address)
    if is_jobs(address):
        from saeray.client.jobs import sweep_as_job

        assert address is not None
        if scheduler is not None:
            raise bad_value("address", address, "a job takes no scheduler; use ray://HOST:10001.")
        return sweep_as_job(config, address, namespace, live)
    if is_outside(address):
        with connected(address, namespace):
            from saeray.client import driver

            return driver.sweep(config, asked, scheduler, live, given)
    config = with_absolute_paths(config)
    assert config.name is not None and config.storage_path is not None
    folder, saes = Folder.at(config.storage_path) / config.name, expand(config)
    versions = ask_for(folder, with_absolute_paths(asked), saes, given)
    try:
        with driving(folder), connected(address, namespace) as ends_ray:
            result = run(
                saes, folder, config.name, scheduler, live, ends_ray, versions=versions, began=began
            )
    except ConfigError:
        forget_refused(folder)
        raise
    return result.with_all_ended()


def resume(
    folder: str | os.PathLike[str],
    *,
    address: str | None = None,
    namespace: str | None = None,
    scheduler: Any = None,
    live: bool = True,
    changes: Mapping[str, Any] | None = None,
) -> SweepResult:
    """Goes on with a sweep that was interrupted, to the files an uninterrupted one gives.

    SAEs that are done, were stopped by a scheduler or failed by themselves stay as they are; the
    others go on from their newest checkpoint. On a cluster where the sweep still runs, this joins
    it.

    Args:
        folder: of the sweep: its path or URI (from outside a cluster: its path there), or the
            name of a sweep that the cluster knows (`saeray status`).
        changes: `{"resources": {"harvesters": 2}}`: where it runs, which changes no byte; and
            `training_tokens`, which may become more (docs/faults.md says of which SAEs).

    Raises:
        ConfigError: no sweep is there, its sweep.yaml is damaged, or a change that can't be made.
    """
    refuse_takeover(scheduler)
    began, address = time.time(), chosen(address)
    if is_jobs(address):
        from saeray.client.jobs import resume_as_job

        assert address is not None
        return resume_as_job(str(folder), address, namespace, live, changes or {})
    if is_outside(address):
        with connected(address, namespace):
            from saeray.client import driver

            return driver.resume(str(folder), scheduler, live, changes or {})
    place = Folder.at(folder)
    if address not in (None, LOCAL) and "/" not in str(folder) and not place.names():
        with connected(address, namespace):
            from saeray.cluster import registry

            place = Folder.at(registry.folder_called(str(folder)) or folder)
    write = checked(place, changes or {})
    done = done_already(place) if not changes else None
    if done is not None:
        return with_pages(done, address, namespace, live)
    with driving(place), connected(address, namespace) as ends_ray:
        if changes:
            refuse_running(place)
            write()
            done = done_already(place)
            if done is not None:
                return done  # only where it runs has changed
        saes = saes_of(place)
        result = run(saes, place, place.name, scheduler, live, ends_ray, resuming=True, began=began)
    return result.with_all_ended()


def with_pages(
    result: SweepResult, address: str | None, namespace: str | None, live: bool
) -> SweepResult:
    """A sweep that has ended, with those of its pages of features that were left to be made."""
    config = saes_of(result.folder)[0].config
    if left_at_end(result.folder, config, result.rows) is None:
        return result

    def say(text: str) -> None:
        if live:
            print(printable(text), file=sys.stderr, flush=True)

    with driving(result.folder), connected(address, namespace):
        prevented = make_at_end(result.folder, config, result.rows, say)
    result.status.warnings = [] if prevented is None else [prevented]
    return result


def language_model_sae_runner(
    cfg: LanguageModelSAERunnerConfig,
) -> SAE | list[SAE]:
    """The guide's runner: trains and returns the SAE (of a grid, all of them in grid order).

    Prints where the results are; each SAE's `cfg` says which it is.

    Raises:
        ConfigError: bad input. SaerayError: training failed.
    """
    result = sweep(cfg)
    print(printable(f"results: {result.folder.uri}"))
    failed = [row for row in result.rows if row["status"] not in (DONE, STOPPED)]
    if failed:
        raise SaerayError("; ".join(str(row["error"]) for row in failed))
    trained = [result.load(row["trial"]) for row in result.rows]
    return trained if grid_axes(cfg) or cfg.grid else trained[0]


def default_name(config: LanguageModelSAERunnerConfig) -> str:
    """<model>-<hook point>-<time>: readable, and new each time."""
    model = Path(str(config.model_name)).name.partition(":")[0]  # of synthetic:… only that
    hook = str(config.hook_point).replace("blocks.", "").replace("{layer}", "x")
    return f"{model}-{hook}-{time.strftime('%Y%m%d-%H%M%S')}"


def with_absolute_paths(config: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """Actors run in other working directories: local paths are made absolute here."""

    def to_be_made(path: str | None) -> str | None:
        if path is not None and "://" not in path:
            return str(Path(path).expanduser().absolute())
        return path

    return with_absolute_inputs(config).replace(
        storage_path=to_be_made(config.storage_path),
        activation_cache=to_be_made(config.activation_cache),
    )
