"""Where the seconds go from `saeray sweep` to the first optimizer step, and to the command's end.

    python benchmarks/startup.py                 # sweeps/tiny.yaml, one round; about a minute
    python benchmarks/startup.py --rounds 3 --set training_tokens=131072

Starts the command as a user does, with a Ray of its own; nothing else should run on the machine.
Prints when each part of the start was there, in seconds from the command (medians over the rounds),
and what each process had taken of the CPU by the first step: on few cores this sum is what counts.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
LOOK_SECONDS = 0.1


def titles(process: psutil.Process) -> str:
    """What a process is, in a word or two."""
    words = process.cmdline()
    text = " ".join(words)
    if text.startswith("ray::"):
        return re.split(r"[. ]", text[5:])[0]
    scripts = [Path(w).name for w in words[:4] if not w.startswith("-")]
    return " ".join(s for s in scripts if not s.startswith("python"))[:40] or text[:40]


def one_round(arguments: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds from the command to each milestone, and of the CPU by process, to the first step."""
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "status.json"
        command = [sys.executable, "-m", "saeray", "sweep", *arguments, "--storage-path", folder]
        environment = os.environ | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_ADDRESS": "local",
            "WANDB_MODE": os.environ.get("WANDB_MODE", "offline"),
            "SAERAY_STATUS_FILE": str(said),  # absolute, so not among Ray's logs
        }
        began = time.time()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        used: dict[int, tuple[str, float]] = {}
        first_step = None
        while process.poll() is None and first_step is None:
            for one in [psutil.Process(process.pid), *all_below(process.pid)]:
                try:
                    times = one.cpu_times()
                    used[one.pid] = (titles(one), times.user + times.system)
                except psutil.Error:
                    continue  # it has ended meanwhile
            if said.exists():
                first_step = json.loads(said.read_text())["training_since"]
            time.sleep(LOOK_SECONDS)
        text = process.communicate()[0]
        ended = time.time()
        if process.returncode or first_step is None:
            raise RuntimeError(f"the sweep failed:\n{text[-4000:]}")
        status = json.loads(said.read_text())
    at = {name: when - began for name, when in status["milestones"].items()}
    at |= {"first step": first_step - began, "end of training": status["training_until"] - began}
    at["end of the command"] = ended - began
    cpu: dict[str, float] = {}
    for name, seconds in used.values():
        cpu[name] = cpu.get(name, 0.0) + seconds
    return at, cpu


def all_below(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in rounds for name in one)
    return {name: statistics.median(one.get(name, 0.0) for one in rounds) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default=str(ROOT / "sweeps" / "tiny.yaml"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    options = [word for setting in given.set for word in ("--set", setting)]
    rounds = [one_round([given.file, *options]) for _ in range(given.rounds)]
    at, cpu = median([r[0] for r in rounds]), median([r[1] for r in rounds])
    print(f"{given.file}, {os.cpu_count()} cores, {given.rounds} rounds; seconds from the command")
    for name, seconds in sorted(at.items(), key=lambda item: item[1]):
        print(f"  {seconds:6.1f}  {name}")
    print(f"CPU seconds by about the first step: {sum(cpu.values()):.1f}")
    for name, seconds in sorted(cpu.items(), key=lambda item: -item[1]):
        if seconds >= 0.1:
            print(f"  {seconds:6.1f}  {name}")


if __name__ == "__main__":
    main()
