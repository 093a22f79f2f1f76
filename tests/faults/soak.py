"""`make soak`: sweeps whose processes are killed at random, from a seed; one line per run.

    python tests/faults/soak.py --seed 7 --minutes 60 --kills 4
    python tests/faults/soak.py --cells --keep soak | tee soak.log     # docs/faults.md's table
    python tests/faults/soak.py --table soak.log                       # as Markdown

Each run is the same sweep by the command line (4 SAEs in 2 packs, 2 harvesters), and so many
signals at random moments from its first second to its end: SIGKILL, SIGTERM, or SIGSTOP for a
while; to one process, to two or three in the same second, or to one that has just been started
again; also to the driver, whose sweep then goes on by `--resume`. A run is `ok` when its sweep ends
with exit code 0, its weights, logs (without their times), features and rows are those of a sweep
that was left alone, and nothing is left of it: no process, no temporary file, no `.ray`. What
happens to which kind of process at which second is a function of the run's seed; `--seed N --runs
1` makes that run again. `--only "Roster:KILL@4,driver:TERM@training"` says it instead of a seed: a
moment is a number of seconds, or one of `PHASES`, in which a line names it too. `--cells` goes
through every signal to every kind of process in every phase, seven signals a run; `--config` soaks
another sweep.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from faults.blows import DRIVER, KINDS, RAYS, SIGNALS, Blow, blows, cells, table
from support.running import Ended, config

STOP_SECONDS = 20.0
LIMIT = 420.0  # of a run, beside its stops, or five times what it takes alone: then it hangs
LEFT_SECONDS = 60.0  # that agents of a Ray that was killed may take to notice it
APPEARS_SECONDS = 25.0  # that a kind of process is waited for
FIGURES = ("trial", "status", "ce_loss_score", "l0", "explained_variance", "n_training_tokens")


@dataclass
class Run:
    """What came of one sweep."""

    code: int | None = None
    seconds: float = 0.0
    sent: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    said: str = ""


def soak_config() -> dict:
    return config() | dict(
        expansion_factor=2,
        l1_coefficient=[1e-3, 2e-3],
        training_tokens=150 * 1024,
        checkpoint_every_s=5.0,
        resources=dict(harvesters=2, saes_per_trainer=2),
    )


def read_config(path: str | None) -> dict:
    """`soak_config`, with the fields of a sweep file in place of its own; null takes one out."""
    changes = yaml.safe_load(Path(path).read_text()) if path else {}
    return {k: v for k, v in (soak_config() | changes).items() if v is not None}


class Sweep:
    """One by the command line, and every process it has had."""

    def __init__(self, folder: Path, name: str, tmp: Path, fields: dict) -> None:
        self.folder, self.name, self.tmp = folder, name, tmp
        self.file = folder / f"{name}.yaml"
        self.file.write_text(yaml.safe_dump(fields))
        self.seen: dict[tuple[int, float], psutil.Process] = {}
        self.output = (folder / f"{name}.log").open("w")
        self.begin()

    def begin(self) -> None:
        """The sweep, or what goes on with it once it has written down what it was asked for."""
        if (self.folder / self.name / "sweep.yaml").exists():
            self.process = self.command("--resume", str(self.folder / self.name))
        else:
            named = ["--name", self.name, "--storage-path", str(self.folder)]
            self.process = self.command(str(self.file), *named)

    def command(self, *arguments: str) -> subprocess.Popen:
        env = os.environ | {"RAY_TMPDIR": str(self.tmp), "RAY_ADDRESS": "local"}
        env |= {"RAY_AUTH_MODE": "disabled", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        return subprocess.Popen(
            [sys.executable, "-m", "saeray", "sweep", *arguments],
            stdout=self.output, stderr=subprocess.STDOUT, env=env,
        )  # fmt: skip

    def look(self) -> list[psutil.Process]:
        """Every process below the driver; remembered."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        for p in below:
            with suppress(psutil.Error):
                self.seen.setdefault((p.pid, p.create_time()), p)
        return below

    def of(self, kind: str) -> list[psutil.Process]:
        found = []
        for p in self.look():
            with suppress(psutil.Error):
                name = "".join(p.cmdline()[:1])
                if name.startswith(KINDS.get(kind, " ")) or Path(name).name == RAYS.get(kind):
                    found.append(p)
        return sorted(found, key=lambda p: p.pid)

    def phase(self) -> str:
        """The furthest of `PHASES` that is reached."""
        place = self.folder / self.name
        if (place / "results.parquet").exists():
            return "closing"
        if any(place.glob("trials/*/final")):
            return "end"
        if any(place.glob("trials/*/checkpoints/*/train_state.json")):
            return "saved"
        if any(log.stat().st_size for log in place.glob("trials/*/metrics.jsonl")):
            return "training"
        if self.of("ActivationBuffer"):
            return "window"
        return "loading" if self.of("Harvester") else "start"

    def left(self) -> list[psutil.Process]:
        return [p for p in self.seen.values() if p.is_running() and p.status() != "zombie"]

    def end_left(self) -> None:
        for p in [*self.left(), self.process]:
            with suppress(psutil.Error, ProcessLookupError):
                p.kill()
        psutil.wait_procs(list(self.seen.values()), timeout=20)


def send(process: psutil.Process | subprocess.Popen, name: str, wake: list) -> None:
    with suppress(psutil.Error, ProcessLookupError):
        process.send_signal(SIGNALS[name])
        if name == "STOP":
            wake.append((time.monotonic() + STOP_SECONDS, process))


def disturbed(sweep: Sweep, plan: list[Blow], limit: float) -> Run:
    """Runs a sweep to its end, with all this happening to it."""
    run, began = Run(), time.monotonic()
    chance = random.Random(len(plan))
    waiting, wake = list(plan), []
    again: list[tuple[str, str, set[int]]] = []
    missed: dict[Blow, float] = {}  # since when there is none of its kind
    interrupted = False  # by us
    looked, phase = 0.0, "start"

    def noted(kind: str, name: str, more: str = "") -> None:
        run.sent.append(f"{kind}:{name}@{time.monotonic() - began:.1f}/{phase}{more}")

    while True:
        now = time.monotonic()
        for due, process in [w for w in wake if w[0] <= now]:
            wake.remove((due, process))
            with suppress(psutil.Error, ProcessLookupError):
                process.send_signal(signal.SIGCONT)
        if now - looked > 0.3:
            sweep.look()
            looked, phase = now, sweep.phase()
        for blow in [b for b in waiting if b.is_due(now - began, phase)]:
            if blow.kind == DRIVER:
                waiting.remove(blow)
                send(sweep.process, blow.signal, wake)
                noted(DRIVER, blow.signal)
                interrupted = True
                continue
            there = sweep.of(blow.kind)
            if not there:
                if now - missed.setdefault(blow, now) > APPEARS_SECONDS:
                    waiting.remove(blow)
                continue
            waiting.remove(blow)
            victim = chance.choice(there)
            send(victim, blow.signal, wake)
            noted(blow.kind, blow.signal)
            interrupted |= blow.kind in RAYS
            if blow.again:
                again.append((blow.kind, blow.signal, {p.pid for p in there}))
        for one in list(again):
            kind, name, before = one
            new = [p for p in sweep.of(kind) if p.pid not in before]
            if new:
                again.remove(one)
                send(new[0], name, wake)
                noted(kind, name, "+")
        code = sweep.process.poll()
        if code is not None:
            if interrupted and code != 0:
                interrupted = False
                time.sleep(2.0)  # its Ray's processes notice that it is gone
                sweep.begin()
                continue
            run.code = code
            break
        if now - began > limit + STOP_SECONDS * sum(b.signal == "STOP" for b in plan):
            run.problems.append(f"hangs: no end after {now - began:.0f} s")
            break
        time.sleep(0.05)
    for _, process in wake:
        with suppress(psutil.Error, ProcessLookupError):
            process.send_signal(signal.SIGCONT)
    run.seconds = time.monotonic() - began
    return run


def digest_of(folder: Path, name: str) -> dict[str, str]:
    """What a sweep has left behind, by hashes; without its times."""
    ended = Ended(folder, name)

    def short(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()[:16]

    rows = sorted(([r[f] for f in FIGURES] for r in ended.rows), key=str)
    return {
        **{f"weights {k}": short(v) for k, v in ended.weights().items()},
        **{f"features {k}": short(v) for k, v in ended.features().items()},
        **{f"log {k}": short(json.dumps(v).encode()) for k, v in ended.logs().items()},
        "rows": short(json.dumps(rows).encode()),
    }


def leftovers(sweep: Sweep) -> list[str]:
    deadline = time.monotonic() + LEFT_SECONDS
    while sweep.left() and time.monotonic() < deadline:
        time.sleep(0.5)
    found = []
    for p in sweep.left():
        with suppress(psutil.Error):
            found.append(f"process {p.name()}")
    place = sweep.folder / sweep.name
    found += [str(p.relative_to(place)) for p in place.rglob("*.tmp")]
    if (place / ".ray").exists():
        found.append(".ray")
    return found


def one_run(
    folder: Path,
    name: str,
    fields: dict,
    plan: list[Blow],
    wanted: dict[str, str] | None,
    limit: float = LIMIT,
) -> Run:
    shutil.rmtree(folder / name, ignore_errors=True)
    tmp = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    sweep = Sweep(folder, name, tmp, fields)
    try:
        run = disturbed(sweep, plan, limit)
        if run.code is not None:
            if run.code != 0:
                run.problems.append(f"exit code {run.code}")
            if wanted is not None and run.code == 0:
                found = digest_of(folder, name)
                differ = [k for k in sorted(wanted | found) if wanted.get(k) != found.get(k)]
                if differ:
                    run.problems.append(f"differs in {', '.join(differ[:4])}")
            left = leftovers(sweep)
            if left:
                run.problems.append(f"left: {', '.join(left[:4])}")
    finally:
        sweep.end_left()
        sweep.output.close()
        shutil.rmtree(tmp, ignore_errors=True)
    run.said = (folder / f"{name}.log").read_text()
    return run


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument(
        "--seed", type=int, default=1, help="of the first run; the next has seed + 1"
    )
    asked.add_argument("--minutes", type=float, default=30.0, help="no run begins after them")
    asked.add_argument("--runs", type=int, default=10**6)
    asked.add_argument("--kills", type=int, default=4, help="signals in each run")
    asked.add_argument(
        "--seconds", type=float, help="over which they are spread (default: measured)"
    )
    asked.add_argument("--only", help="these blows instead: Roster:KILL@4,driver:TERM@9")
    asked.add_argument("--cells", action="store_true", help="the runs of `cells`, seed 1 the first")
    asked.add_argument("--config", help="a file of fields that the sweep has in place of its own")
    asked.add_argument("--table", nargs="+", metavar="LOG", help="only print it, of these outputs")
    asked.add_argument("--keep", help="folder for the sweeps' files; those of runs that fail stay")
    given = asked.parse_args()
    if given.table:
        print(table([line for log in given.table for line in Path(log).read_text().splitlines()]))
        return 0
    fields, in_cells = read_config(given.config), cells()
    runs = min(given.runs, len(in_cells) + 1 - given.seed) if given.cells else given.runs

    began = time.monotonic()
    folder = Path(given.keep or tempfile.mkdtemp(prefix="saeray-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "undisturbed.json"
    if kept.exists():
        alone = json.loads(kept.read_text())
    else:
        run = one_run(folder, "undisturbed", fields, [], None, limit=3600.0)
        if run.problems:
            print(f"undisturbed: {run.problems}\n{run.said[-3000:]}")
            return 1
        alone = {"seconds": run.seconds, "digest": digest_of(folder, "undisturbed")}
        kept.write_text(json.dumps(alone))
    print(f"undisturbed: {alone['seconds']:.0f} s; {folder}", flush=True)
    failed = sent = n = 0
    while n < runs and time.monotonic() - began < 60 * given.minutes:
        seed, name = given.seed + n, f"run-{given.seed + n}"
        if given.only:
            plan = [Blow.read(b) for b in given.only.split(",")]
        elif given.cells:
            plan = in_cells[seed - 1]
        else:
            plan = blows(seed, given.kills, given.seconds or alone["seconds"])
        limit = max(LIMIT, 5 * alone["seconds"])
        run = one_run(folder, name, fields, plan, alone["digest"], limit)
        n, sent = n + 1, sent + len(run.sent)
        failed += bool(run.problems)
        outcome = "; ".join(run.problems) or "ok"
        print(f"seed {seed}: {outcome}, {run.seconds:.0f} s: {' '.join(run.sent)}", flush=True)
        if not run.problems:
            shutil.rmtree(folder / name, ignore_errors=True)
    print(f"{n} runs, {sent} signals, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
