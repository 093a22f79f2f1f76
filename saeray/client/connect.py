"""To a Ray cluster from wherever one is: this machine, a node of it, or a laptop (`ray://`).

- `local`: Ray is started on this machine, for this process.
- None: as `ray.init()` has it; a cluster that runs on this machine, else as `local`.
- `auto`, `host:6379`: this process is on a node of a running cluster.
- `ray://host:10001`: it is not (Ray Client); the package as it is here travels along.
- `http://host:8265`: Ray's job server; see `saeray.client.jobs`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saeray.actors.environment import quieten_train
from saeray.client.ending import lost_without_ray, signals_kept
from saeray.client.own_ray import runs_here, start_own_ray
from saeray.errors import ConfigError, bad_value
from saeray.lm.hub import PACKAGE
from saeray.spec.messages import NAMESPACE

CONNECT_TRIES = 3
EXIT_SECONDS = 5.0  # for the workers of a Ray that was ended, to end too
CLIENT, JOBS, LOCAL = "ray://", ("http://", "https://"), "local"


def chosen(address: str | None) -> str | None:
    """The address to connect to: the one given, or RAY_ADDRESS; None: this machine."""
    return address or os.environ.get("RAY_ADDRESS") or None


def is_jobs(address: str | None) -> bool:
    return address is not None and address.startswith(JOBS)


def is_outside(address: str | None) -> bool:
    """Whether this process is, or will be, a client of a cluster and not a part of it."""
    import ray

    if ray.is_initialized():
        return bool(ray.util.client.ray.is_connected())
    return address is not None and address.startswith(CLIENT)


def runtime_env() -> dict[str, Any]:
    """For `ray.init("ray://…", runtime_env=saeray.runtime_env())`: this machine's saeray travels.

    Every process of the connection then runs the package as it is here, whatever the cluster has
    installed. Of the environment only Ray's own settings go along, since Ray writes a runtime_env,
    and with it every key, into its logs (see `actors.make.passed_on`).
    """
    return {"py_modules": [str(PACKAGE)], "env_vars": settings()}


def settings() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key.startswith("RAY_TRAIN_")}


def quieten() -> None:
    """Settings of Ray Train and Tune that processes of a sweep have, before these are imported."""
    quieten_train()
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own tables; the live view is ours
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C ends the sweep at once
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # we write the metrics
    # Trials only wait for reports: started one after the other they take no cores from the rest.
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "2")
    without_lines_of_raylets()


# What raylets say of what is meant to be so, or is mended and said by a sweep in its own words.
OF_RAYLETS = ("worker processes have been started on", "A worker died or was killed while")


def without_lines_of_raylets() -> None:
    """Of what Ray prints into its driver's stdout, lines that are no news do not appear.

    `log_to_driver` is of workers' lines only; these come by another way, which Ray 2.60 has no
    switch for.
    """
    from ray._private import worker

    printed = getattr(worker, "print_to_stdstream", None)
    if printed is None or getattr(printed, "filters", False):
        return

    def filtered(data: Any, *args: Any, **kwargs: Any) -> None:
        lines = [line for line in data["lines"] if not any(t in line for t in OF_RAYLETS)]
        if lines or data.get("pid") != "raylet":
            printed(
                data | {"lines": lines} if data.get("pid") == "raylet" else data, *args, **kwargs
            )

    filtered.filters = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = filtered


def start_ray(address: str | None, namespace: str | None = None) -> bool:
    """Connects to a cluster or starts Ray on this machine; whether it did either.

    Raises:
        ConfigError: no cluster answers there, or not one this machine can talk to.
    """
    quieten()
    import ray

    if ray.is_initialized():
        return False
    address = chosen(address)
    if is_jobs(address):
        raise bad_value(
            "address",
            address,
            "Ray's job server takes whole sweeps only; use ray://HOST:10001 for this.",
        )
    options: dict[str, Any] = {
        "namespace": namespace or NAMESPACE,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    if address == LOCAL or (address is None and not runs_here()):
        with signals_kept():
            start_own_ray(**options)
        return True
    address = address or "auto"
    options["runtime_env"] = {"env_vars": settings()}
    if address.startswith(CLIENT):
        options["runtime_env"] = runtime_env()
    for tries_left in reversed(range(CONNECT_TRIES)):
        try:
            with signals_kept():
                ray.init(address=address, **options)
            break
        except Exception as error:  # Ray raises almost anything, gRPC's own errors included
            # A head forks a server for each client, and one in ten of those dies at its birth
            # unless GRPC_ENABLE_FORK_SUPPORT=0 stands in the head's environment (Ray 2.60).
            if not (tries_left and isinstance(error, ConnectionAbortedError)):
                raise why_not(address, error) from None
    return True


@contextmanager
def connected(address: str | None, namespace: str | None = None) -> Iterator[bool]:
    """With Ray, ended again if it was started here; whether it is this process's own Ray."""
    started = start_ray(address, namespace)
    own = started and is_own()
    try:
        with lost_without_ray(own_processes() if own else {}):
            yield own
    finally:
        if started:
            end_ray()


def end_ray() -> None:
    """Ends the connection, and with a Ray of this process's own each of its processes."""
    import ray
    from ray._private import worker

    with all_ended([worker._global_node] if is_own() else []):
        ray.shutdown()


@contextmanager
def all_ended(nodes: Sequence[Any]) -> Iterator[None]:
    """With the end of these Ray nodes, which this process has started, every worker of them ends.

    Now and then a worker of Ray 2.60 that has shut down by itself hangs in its last destructors
    (`ray::pubsub::Publisher`'s posts to an event loop that is being destroyed; 4 of some thousand,
    on 2 slow cores); it would be there for ever, with all its memory.
    """
    import psutil  # Ray brings it

    workers = []
    for node in nodes:
        for raylet in node.all_processes.get("raylet", []):
            try:
                workers += psutil.Process(raylet.process.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
    yield
    left = psutil.wait_procs(workers, timeout=EXIT_SECONDS)[1]
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=EXIT_SECONDS)


def is_own() -> bool:
    """Whether the Ray this process is connected to was started by it, and ends with it."""
    from ray._private import worker

    node = worker._global_node
    return node is not None and bool(node.is_head())


def own_processes() -> dict[str, Any]:
    """The processes that this one's own Ray can't do without, by their names."""
    from ray._private import worker

    every = worker._global_node.all_processes
    return {name: every[name][0].process for name in ("gcs_server", "raylet") if every.get(name)}


def why_not(address: str, error: Exception) -> ConfigError:
    """Why there is no connection, and what to set on which side."""
    import ray

    text = " ".join(str(error).split())
    if re.search(r"[Vv]ersion mismatch", text):
        import platform

        return bad_value(
            "address",
            address,
            f"{text} On this side there are Ray {ray.__version__} and Python "
            f"{platform.python_version()}: install the cluster's versions here (a virtual "
            "environment with that Python, `pip install ray==…`), or this side's on the cluster "
            "(setup_commands of cluster.yaml, then `ray up` again).",
        )
    mode = os.environ.get("RAY_AUTH_MODE", "not set")
    token = "there" if has_token() else "not there"
    return bad_value(
        "address",
        address,
        f"no Ray cluster answers there ({type(error).__name__}: {text[:400]}). Is `ray start "
        f"--head` running and its port reachable from here (10001 for ray://, 6379 without)? A "
        f"cluster with token authentication also just does not answer those who lack its token: "
        f"on this side RAY_AUTH_MODE is {mode} and a token is {token}; set RAY_AUTH_MODE=token and "
        "copy the head's ~/.ray/auth_token here. A cluster without it wants "
        "RAY_AUTH_MODE=disabled.",
    )


def has_token() -> bool:
    """Whether this side has a token that Ray would use."""
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    return "RAY_AUTH_TOKEN" in os.environ or path.is_file()
