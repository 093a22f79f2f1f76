"""wandb's offline runs, read back, and a server that takes connections and never answers."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from typing import NamedTuple


class OfflineRun(NamedTuple):
    """What `wandb sync` would send of one folder."""

    id: str
    name: str
    group: str
    history: list  # a dict for each line that was logged, with `_step`
    exit_code: int | None
    job_type: str
    summary: dict  # the last value of each key
    artifacts: dict  # what was asked for, by name: the files in it
    tables: dict  # by key: a table's columns and data


def leveldb_records(data, start):
    """The records of wandb's transaction log: LevelDB's format, blocks of 32 KiB."""
    at, parts = 0, b""
    while at + 7 <= len(data):
        left = 32768 - (at + start) % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def read_run(folder):
    """The run in an `offline-run-…` folder."""
    from wandb.proto import wandb_internal_pb2

    header, history, exit_code = wandb_internal_pb2.RunRecord(), [], None
    summary, artifacts = {}, {}
    for data in leveldb_records(next(folder.glob("*.wandb")).read_bytes()[7:], start=7):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            header = record.run
        elif kind == "exit":
            exit_code = record.exit.exit_code
        elif kind == "history":
            items = record.history.item
            history.append(
                {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            )
        elif kind == "summary":
            for i in record.summary.update:
                summary["/".join(i.nested_key) or i.key] = json.loads(i.value_json)
        elif kind == "artifact" and record.artifact.type != "run_table":  # those are its tables
            entries = record.artifact.manifest.contents
            artifacts[record.artifact.name] = sorted(entry.path for entry in entries)
    tables = {
        path.name.rpartition("_0_")[0]: json.loads(path.read_bytes())
        for path in (folder / "files" / "media" / "table").glob("*.table.json")
    }
    about = header.run_id, header.display_name, header.run_group
    return OfflineRun(*about, history, exit_code, header.job_type, summary, artifacts, tables)


def read_runs(folder):
    """All runs below a folder's wandb/, oldest first.

    wandb's own process writes the last records after `finish` has returned.
    """
    deadline = time.monotonic() + 20
    runs = sorted((folder / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_ctime_ns)
    while True:
        read = [read_run(run) for run in runs]
        if all(run.exit_code is not None for run in read):
            return read
        assert time.monotonic() < deadline, f"not finished: {read}"
        time.sleep(0.05)


@contextmanager
def silent_server():
    """Its URL, and the connections it has taken. It answers none."""
    server = socket.create_server(("127.0.0.1", 0), backlog=64)
    taken = []

    def take():
        while True:
            try:
                taken.append(server.accept()[0])
            except OSError:  # closed
                return

    threading.Thread(target=take, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
    finally:
        server.close()
        for connection in taken:
            connection.close()
