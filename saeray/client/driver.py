"""A sweep on a cluster that this process is outside of: driven over there, watched from here.

Over `ray://` (Ray Client) whatever a laptop starts would end with its connection. So the driver of
a sweep, the process that runs Tune, is an actor on the head node that belongs to nobody: the laptop
looks at it, may leave and come back, and fetches the results.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray

from saeray.actors import waiting
from saeray.actors.head_folder import seen_from_here
from saeray.actors.make import actor, passed_on
from saeray.actors.names import drivers_name, roster_name
from saeray.actors.nodes import namespace, on_head
from saeray.actors.waiting import POLL_SECONDS, NotYet
from saeray.client.changes import checked, refuse_running
from saeray.client.connect import quieten
from saeray.client.result import SweepResult
from saeray.client.session import (
    ask_for,
    done_already,
    provenance,
    refuse_existing,
    run,
    saes_of,
    with_absolute_inputs,
)
from saeray.client.watch import Outcome, Stopped, watch
from saeray.cluster import registry
from saeray.errors import ConfigError, SaerayError
from saeray.files.fetch import fetch_folder
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import SAE, expand
from saeray.spec.messages import SweepStatus

COLLECT_SECONDS = 120.0  # that a finished driver waits for somebody to look, before it goes
CALL_SECONDS = 60.0  # for one answer over the client


class Driver:
    """The actor: runs one sweep in a thread and tells how it stands."""

    def __init__(
        self,
        configs: dict[str, dict[str, Any]],
        folder: str,
        scheduler: Any,
        resuming: bool,
        versions: Mapping[str, Any],
        environment: dict[str, str],
        begun_by: str,
    ) -> None:
        os.environ.update(environment)
        self.begun_by = begun_by
        quieten()
        self.saes = [SAE(n, LanguageModelSAERunnerConfig.from_dict(c)) for n, c in configs.items()]
        self.folder = Folder.at(folder)
        self.scheduler = scheduler
        again = ray.get_runtime_context().was_current_actor_reconstructed
        self.resuming = resuming or again
        self.versions = versions
        self.status = SweepStatus(rows=[], phase="starting")
        self.ended: Outcome | None = None
        self.news = threading.Event()
        self.me = ray.get_runtime_context().current_actor
        threading.Thread(target=self.drive, name="driver", daemon=True).start()

    def look(self) -> SweepStatus:
        return self.status

    def takes(self, asking: str) -> bool | None:
        """None when what it drove has ended, and was begun by somebody else than who asks."""
        return None if self.news.is_set() and self.begun_by != asking else True

    def outcome(self) -> Outcome | NotYet:
        """How the sweep ended, once it has."""
        if not self.news.wait(POLL_SECONDS):
            return NotYet("the sweep")
        assert self.ended is not None
        return self.ended

    def stop(self) -> None:
        """Ends the training; the outcome follows once what was trained is saved."""
        roster = ray.get_actor(roster_name(self.folder.name, self.folder.uri), namespace())
        waiting.ask(roster.interrupt.remote, self.saes[0].config.wait_limit_s, "roster")

    def drive(self) -> None:
        def note(status: SweepStatus) -> None:
            self.status = status

        try:
            result = run(
                self.saes,
                self.folder,
                self.folder.name,
                self.scheduler,
                live=False,
                ends_ray=False,
                resuming=self.resuming,
                versions=self.versions,
                watched=note,
            )
            self.ended = Outcome(result.rows, result.status, times=result.times)
        except Exception as error:
            text = str(error) if isinstance(error, SaerayError) else repr(error)
            self.ended = Outcome([], self.status, text, isinstance(error, ConfigError))
        self.news.set()
        time.sleep(COLLECT_SECONDS)
        ray.kill(self.me)


def driver_name(folder: str) -> str:
    name = Folder.at(folder).name
    return drivers_name(roster_name(name, folder))


def sweep(
    config: LanguageModelSAERunnerConfig,
    asked: LanguageModelSAERunnerConfig,
    scheduler: Any,
    live: bool,
    given: str | None = None,
) -> SweepResult:
    """`saeray.sweep` on the cluster this process is a client of."""
    assert config.name is not None and config.storage_path is not None
    home, there = home_copy(config.storage_path), over_there(config.storage_path)
    config, asked = (
        with_absolute_inputs(c).replace(
            storage_path=there,
            activation_cache=c.activation_cache and over_there(c.activation_cache),
        )
        for c in (config, asked)
    )
    assert config.name is not None
    folder, saes = seen_from_here((Folder.at(there) / config.name).uri), expand(config)
    if home is not None:
        refuse_existing(home / config.name, config.name)
    ask_for(folder, asked, saes, given)
    return drive(saes, folder, scheduler, live, home and home / config.name)


def resume(
    folder: str, scheduler: Any, live: bool, changes: Mapping[str, Any] = MappingProxyType({})
) -> SweepResult:
    """`saeray.resume` on the cluster this process is a client of; joins a sweep that still runs."""
    place = seen_from_here(registry.folder_called(folder.rstrip("/")) or over_there(folder))
    home = None if "://" in place.uri or Path(folder).is_absolute() else Folder.at(folder)
    write = checked(place, changes)
    if changes:
        refuse_running(place)
        write()
    done = done_already(place)
    if done is not None:
        return done
    return drive(saes_of(place), place, scheduler, live, home, resuming=True)


def home_copy(storage_path: str) -> Folder | None:
    """Where on this side results kept on the head's own disk shall come to in the end."""
    relative = "://" not in storage_path and not storage_path.startswith(("/", "~"))
    return Folder.at(storage_path) if relative else None


def over_there(path: str) -> str:
    """A storage path as the cluster has it: relative ones are below the head's home directory."""
    if "://" in path:
        return path
    task = ray.remote(expanded).options(num_cpus=0, **on_head())
    return str(ray.get(task.remote(path), timeout=CALL_SECONDS))


def expanded(path: str) -> str:
    return str(Path.home() / Path(path).expanduser())


def drive(
    saes: list[SAE],
    folder: Folder,
    scheduler: Any,
    live: bool,
    home: Folder | None,
    resuming: bool = False,
) -> SweepResult:
    """Has the sweep driven on the head node, and watches it until it ends or is left alone."""
    limit = saes[0].config.wait_limit_s
    driver = driver_of(saes, folder, scheduler, resuming, limit)
    try:
        outcome = watch(
            lambda: waiting.ask(driver.look.remote, limit, "the driver on the cluster"),
            lambda: waiting.ask(driver.outcome.remote, limit, "the driver on the cluster"),
            lambda: waiting.ask(driver.stop.remote, limit, "the driver on the cluster"),
            folder.name,
            live,
        )
    except Stopped:
        ray.kill(driver)
        raise
    ray.kill(driver)
    if outcome.error is not None:
        raise (ConfigError if outcome.bad_input else SaerayError)(outcome.error)
    if home is not None:
        fetch_folder(folder, home)
        folder = home
    return SweepResult(folder.name, folder, outcome.rows, outcome.status, outcome.times)


def driver_of(
    saes: list[SAE], folder: Folder, scheduler: Any, resuming: bool, limit_s: float
) -> Any:
    """The sweep's driver: the one that is at it, or a new one.

    One whose sweep has ended stays a while for whoever left it; its outcome is not that of a sweep
    which now goes on.
    """
    me, versions = uuid.uuid4().hex, provenance()
    configs = {s.name: s.config.to_dict() for s in saes}
    options = dict(get_if_exists=True, max_concurrency=8, **on_head())
    driver, _ = waiting.one_that_takes(
        lambda driver: driver.takes.remote(me),
        lambda: actor(Driver, driver_name(folder.uri), **options).remote(
            configs, folder.uri, scheduler, resuming, versions, passed_on(), me
        ),
        limit_s,
        f"the driver of {folder.name}",
        past=ray.kill,
    )
    return driver
