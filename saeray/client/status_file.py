"""The file in which a sweep that runs as a Ray job says how it stands, as JSON, and how it is read.

It lies among Ray's logs, which the dashboard serves; `jobs` reads it from the outside.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from saeray.client.speed import Times
from saeray.files import strict_json
from saeray.spec.messages import Gauges, ReaderGauges, SAERow, SweepStatus

# The environment variable that names the file.
STATUS_FILE = "SAERAY_STATUS_FILE"


class StatusFile:
    """Where a sweep that runs as a Ray job says how it stands (`saeray.client.jobs` reads it)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def wanted(cls) -> StatusFile | None:
        """The file that the environment names, in this node's folder of Ray's logs."""
        from ray._private import worker

        name, node = os.environ.get(STATUS_FILE), worker._global_node
        return cls(Path(node.get_logs_dir_path()) / name) if name and node is not None else None

    def write(
        self,
        status: SweepStatus,
        rows: list[dict[str, Any]] | None = None,
        times: Times | None = None,
    ) -> None:
        data = status_as_data(status)
        if rows is not None:
            data |= {"results": rows, "times": times}
        part = self.path.with_suffix(".part")
        part.write_text(strict_json.dumps(data), encoding="utf-8")
        os.replace(part, self.path)


def status_as_data(status: SweepStatus) -> dict[str, Any]:
    """A status as JSON has it; of the metrics only numbers."""
    data = asdict(status)
    for row in data["rows"]:
        row["metrics"] = {k: v for k, v in row["metrics"].items() if isinstance(v, (int, float))}
    data["gauges"] = [g._asdict() for g in status.gauges]
    data["readers"] = {name: r._asdict() for name, r in status.readers.items()}
    return data


def status_from(data: Mapping[str, Any]) -> SweepStatus:
    """The inverse of `status_as_data`; what else stands there is left out."""
    known = {f.name for f in fields(SweepStatus)}
    values = {key: value for key, value in data.items() if key in known}
    values["rows"] = [SAERow(**row) for row in data["rows"]]
    values["gauges"] = [Gauges(**g) for g in data["gauges"]]
    values["readers"] = {name: ReaderGauges(**r) for name, r in data["readers"].items()}
    return SweepStatus(**values)
