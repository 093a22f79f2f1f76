"""`saeray status`: the sweeps of a cluster, running and finished."""

from __future__ import annotations

import io
import time
from dataclasses import asdict, dataclass

import ray
from ray.exceptions import RayError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saeray.client.speed import duration, limit_of
from saeray.cluster import registry
from saeray.cluster.dispatch import CLOSE_SECONDS
from saeray.files import strict_json
from saeray.spec.messages import DONE, FAILED, INTERRUPTED, NAMESPACE, STOPPED, SweepStatus

LOOK_SECONDS = 10.0  # for a roster to answer


@dataclass
class Listed:
    """One sweep, in words."""

    name: str
    namespace: str
    state: str  # running, done, failed, interrupted or lost (its roster is gone without a word)
    n_saes: int
    n_ended: int
    progress: float  # 0 to 1, of all optimizer steps
    began: float  # time.time()
    seconds_left: float | None
    limit: str  # of a running one: what limits it
    folder: str
    error: str | None
    warnings: list[str]


def sweeps_of_cluster() -> list[Listed]:
    """Every sweep the cluster knows, oldest first. Ray must be connected."""
    return [listed(record) for record in registry.read_all()]


def listed(record: registry.Record) -> Listed:
    status = None if record.ended else look(record)
    n_saes = sum(record.states.values())
    n_ended = sum(record.states.get(s, 0) for s in (DONE, STOPPED, FAILED, INTERRUPTED))
    one = Listed(
        record.name, record.namespace, "", n_saes, n_ended, record.progress, record.began,
        None, "", record.folder, record.error, [],
    )  # fmt: skip
    if record.ended:
        one.state = DONE
        if record.states.get(FAILED) or (record.error and not record.states.get(DONE)):
            one.state = FAILED
        elif record.states.get(INTERRUPTED):
            one.state = INTERRUPTED
    elif status is None:
        one.state = "lost"
        one.error = one.error or "its roster is gone; `saeray sweep --resume` goes on with it"
    else:
        with_status(one, status)
    return one


def look(record: registry.Record) -> SweepStatus | None:
    """What a running sweep's roster says, in passing; None when it is gone."""
    try:
        roster = ray.get_actor(record.roster, namespace=record.namespace)
        return ray.get(roster.status.remote(passing=True), timeout=LOOK_SECONDS)
    except (ValueError, RayError):
        return None


def stop(record: registry.Record) -> str:
    """Ends a running sweep, after its packs have saved what they have; what to say of it."""
    if record.ended:
        return f"{record.name} has ended already"
    try:
        roster = ray.get_actor(record.roster, namespace=record.namespace)
        ray.get(roster.interrupt.remote(), timeout=2 * CLOSE_SECONDS)
    except ValueError:
        return f"{record.name} does not run any more; `saeray sweep --resume` goes on with it"
    return f"{record.name} is stopped; `saeray sweep --resume` goes on with it"


def with_status(one: Listed, status: SweepStatus) -> None:
    one.state = "running"
    steps = sum(row.step for row in status.rows)
    total = sum(row.total_steps for row in status.rows)
    one.progress = steps / total if total else 0.0
    one.n_saes = len(status.rows)
    one.n_ended = sum(row.state in (DONE, STOPPED, FAILED, INTERRUPTED) for row in status.rows)
    one.limit = limit_of(status) or status.phase
    one.error = status.error or next((r.error for r in status.rows if r.error), None)
    one.warnings = list(status.warnings)
    if status.training_since is not None and steps:
        elapsed = time.time() - status.training_since
        one.seconds_left = elapsed * (total - steps) / steps


def table(sweeps: list[Listed]) -> str:
    """For a terminal."""
    if not sweeps:
        return "no sweep has been run on this cluster"
    out = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("sweep", "state", "SAEs", "progress", "began", "left", "limited by", "folder"):
        out.add_column(column, overflow="fold")
    for s in sweeps:
        out.add_row(
            Text(s.name if s.namespace == NAMESPACE else f"{s.namespace}/{s.name}"),
            s.state,
            f"{s.n_ended}/{s.n_saes}",
            f"{s.progress:.0%}",
            f"{duration(time.time() - s.began)} ago",
            "" if s.seconds_left is None else duration(s.seconds_left),
            s.limit,
            Text(s.folder),
        )
    text = io.StringIO()
    Console(file=text, width=200).print(out)
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    for s in sweeps:
        lines += [f"! {s.name}: {note}" for note in ([s.error] if s.error else []) + s.warnings]
    return "\n".join(lines)


def as_json(sweeps: list[Listed]) -> str:
    return strict_json.dumps([asdict(s) for s in sweeps], indent=2)
