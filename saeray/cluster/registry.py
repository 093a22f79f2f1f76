"""Which sweeps a cluster runs and has run: a small record each in Ray's own key-value store.

It lives as long as the cluster and needs no process of its own. Results are in the sweeps' folders;
a record says where that is and how it ended.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import ray

from saeray.actors.nodes import namespace, on_head
from saeray.errors import bad_value
from saeray.files import strict_json

TABLE = b"saeray-sweeps"


@dataclass
class Record:
    """One sweep, as its roster wrote it down last."""

    name: str
    namespace: str
    roster: str  # its actor's name
    folder: str
    began: float  # time.time()
    ended: float | None = None
    states: dict[str, int] = field(default_factory=dict)  # state -> number of SAEs
    n_steps: int = 0  # of all its SAEs, trained
    total_steps: int = 0
    error: str | None = None

    @property
    def full_name(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def progress(self) -> float:
        return self.n_steps / self.total_steps if self.total_steps else 0.0


def write(record: Record) -> None:
    """Adds or replaces a record. In a process of the cluster."""
    from ray.experimental.internal_kv import _internal_kv_put

    key = f"{record.namespace}/{record.roster}"
    _internal_kv_put(key.encode(), strict_json.dumps(asdict(record)).encode(), namespace=TABLE)


def read_all() -> list[Record]:
    """All records, oldest first; from inside the cluster or over a client."""
    task = ray.remote(read_here).options(num_cpus=0, scheduling_strategy="DEFAULT", **on_head())
    records = [Record(**data) for data in ray.get(task.remote(), timeout=60)]
    return sorted(records, key=lambda r: r.began)


def folder_called(name: str) -> str | None:
    """The folder of the newest sweep of that name in this process's namespace."""
    mine = namespace()
    found = [r.folder for r in read_all() if (r.namespace, r.name) == (mine, name)]
    return found[-1] if found else None


def find_record(name: str) -> Record:
    """The newest sweep of that name, or NAMESPACE/NAME, which the cluster knows.

    Raises:
        ConfigError: it knows none, or some in several namespaces; names those it knows.
    """
    records = read_all()
    found = [r for r in records if name in (r.name, r.full_name)]
    if not found:
        known = ", ".join(dict.fromkeys(r.full_name for r in records)) or "none"
        raise bad_value("SWEEP", name, f"the cluster knows {known}.")
    full_names = list(dict.fromkeys(r.full_name for r in found))
    if len(full_names) > 1:
        raise bad_value("SWEEP", name, f"there are {', '.join(full_names)}: which of them?")
    return found[-1]


def read_here() -> list[dict[str, Any]]:
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    values = (
        _internal_kv_get(key, namespace=TABLE) for key in _internal_kv_list(b"", namespace=TABLE)
    )
    return [strict_json.loads(value) for value in values if value is not None]
