"""What `saeray plan` predicts of a sweep, against the sweep that follows: time and memory.

    python benchmarks/plan.py                      # sweeps/tiny.yaml, one round; 3 minutes
    python benchmarks/plan.py --rounds 3 --set training_tokens=524288

Calibrates and then runs the command as a user does, with a Ray of its own; nothing else should run
on the machine. Memory is the largest of the command's process tree (proportional set size, asked
every second, as in peers.py), and the object store that of the buffer's blocks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from peers import ROOT, watched

from saeray import plan
from saeray.client.cli import load_sweep_file

os.environ.setdefault("WANDB_MODE", "offline")


def one_round(file: str, changes: list[str]) -> list[tuple[str, float, float]]:
    """(what, predicted, measured) of one calibration and the run after it."""
    predicted = plan(load_sweep_file(file, changes), address="local")
    print(predicted, flush=True)
    found = predicted.forecast
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RAY_ADDRESS"] = "local"
        options = [word for change in changes for word in ("--set", change)]
        command = [sys.executable, "-m", "saeray", "sweep", file, *options, "--name", "run"]
        _, wall, memory = watched([*command, "--storage-path", folder])
        account = json.loads((Path(folder) / "run" / "account.json").read_text())
        session: dict[str, Any] = account["sessions"][0]
    rest = session["ended"] - session["began"] - session["start_up_s"] - session["training_s"]
    before = wall - (session["ended"] - session["began"])  # Python's own start, and Ray's end
    return [
        ("the whole command, s", found.total, wall),
        ("  start-up, s", found.start_up + found.harvest, session["start_up_s"]),
        ("  training, s", found.training, session["training_s"]),
        ("  evaluation and the end, s", found.evaluation + found.end, rest + before),
        ("memory, GB", predicted.memory_bytes / 1e9, memory),
        ("LM tokens", predicted.lm_tokens, session["harvested_tokens"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default=str(ROOT / "sweeps" / "tiny.yaml"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    print(f"{arguments.file}, {os.cpu_count()} cores")
    for _ in range(arguments.rounds):
        rows = one_round(arguments.file, arguments.set)
        print("\n| | predicted | measured | predicted / measured |\n|---|---|---|---|")
        for what, predicted, measured in rows:
            figures = (f"{x:,.0f}" if x > 1000 else f"{x:.1f}" for x in (predicted, measured))
            print(f"| {what} | {' | '.join(figures)} | {predicted / measured:.2f} |", flush=True)


if __name__ == "__main__":
    main()
