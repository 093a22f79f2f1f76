"""One wandb run per SAE, opened, written to and ended by a thread that nothing else waits for.

wandb may be absent, misconfigured, or a server that takes a connection and never answers. The first
thing that does not work costs one wait and one warning, and ends wandb for this sweep's session:
metrics.jsonl has every line, and `send_whole` makes whole runs of it at any later time.
"""

from __future__ import annotations

import os
import queue
import re
import tempfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from saeray.errors import ConfigError, SaerayError
from saeray.files import frontier
from saeray.files.metrics_log import read_lines
from saeray.files.results import COLUMNS, GROUND_TRUTH_COLUMNS
from saeray.files.storage import Folder
from saeray.files.sweep_folder import SweepFolder
from saeray.spec.config import LanguageModelSAERunnerConfig, digest
from saeray.spec.messages import FAILED

WANDB_SECONDS = 60.0  # that a server may take to open a run, or to take the rest of one at its end
CLOSE_SECONDS = 120.0  # that all that is left may take at a sweep's end
MOST_IN_LINE = 100_000  # log lines that wait for wandb: a few hundred MB
NAME_LENGTH = 128  # of an artifact, at most
ID_FILE = "saeray-id"  # in wandb/


def sweep_id(folder: Folder) -> str:
    """What tells this sweep's runs from all others': made once, kept in the sweep's folder."""
    place = folder / "wandb"
    names = place.names()
    if ID_FILE in names:
        return place.read(ID_FILE).decode().strip()
    # Runs that are there already are an earlier version's, which took the folder's path.
    made = folder.path if names and folder.is_local else uuid.uuid4().hex
    place.write(ID_FILE, made.encode())
    return made


def opened(
    config: LanguageModelSAERunnerConfig,
    name: str,
    folder: Folder,
    directory: str | None,
    resume: Literal["allow"] | None,
    job_type: str,
    values: Mapping[str, Any] | None = None,
) -> Any:
    """A run of the sweep in this folder, whose id is made of `name`; several may be open at once.

    directory: where wandb keeps its files; None: where it keeps those of any script. values: what
    the run shows as its config.

    Raises:
        wandb.Error, OSError: it can't be opened.
    """
    import wandb

    if directory is not None:
        os.makedirs(directory, exist_ok=True)
    return wandb.init(
        id=digest({"sweep": sweep_id(folder), "name": name}, 16),
        name=name or folder.name,
        group=folder.name,
        project=config.wandb_project,
        entity=config.wandb_entity,
        dir=directory,
        resume=resume,
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=WANDB_SECONDS,
            finish_timeout=WANDB_SECONDS,
            finish_timeout_raises=True,
        ),
        job_type=job_type,
        config=None if values is None else dict(values),
    )


class WandbRun:
    """One SAE's run in its own folder."""

    def __init__(
        self,
        config: LanguageModelSAERunnerConfig,
        name: str,
        folder: Folder,
        directory: str | None,
        resume: Literal["allow"] | None,
    ) -> None:
        """As `opened`, which may raise."""
        import wandb

        self.wandb, self.config, self.name, self.folder = wandb, config, name, folder
        self.newest: dict[str, Any] = {}
        self.run = opened(config, name, folder, directory, resume, "sae", config.to_dict())

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        values = {key: value for key, value in metrics.items() if value is not None}
        self.newest |= values
        histogram = values.pop("plots/feature_density_line_chart", None)
        if histogram is not None:
            values["plots/feature_density_line_chart"] = self.wandb.Histogram(
                np_histogram=(histogram["counts"], histogram["edges"])
            )
        self.run.log(values, step=step)

    def finish(self, failed: bool) -> None:
        """Ends it, with the columns of results.csv as its summary."""
        columns = COLUMNS | GROUND_TRUTH_COLUMNS
        known = {c: self.newest[key] for c, key in columns.items() if key in self.newest}
        self.run.summary.update(known)
        if self.config.log_weights_to_wandb and not failed:
            self.log_weights()
        self.run.finish(exit_code=int(failed))

    def log_weights(self) -> None:
        """The published SAE as an artifact, once it is there."""
        final = self.folder / "trials" / self.name / "final"
        files = final.files()
        if not files:
            return
        # Names of artifacts have letters, digits, dashes, underscores and dots.
        name = re.sub(r"[^\w.-]", "_", f"{self.folder.name}-{self.name}")[:NAME_LENGTH]
        artifact = self.wandb.Artifact(name, type="sae", metadata={"sae": self.name})
        for file in files:
            with artifact.new_file(file, "wb") as copy:
                copy.write(final.read(file))
        self.run.log_artifact(artifact)


def log_sweep(folder: Folder, directory: str | None, resume: Literal["allow"] | None) -> bool:
    """One run for the sweep as a whole, named as it is; whether there was anything to log.

    It has results.csv as a table, a scatter of L0 against each figure of fidelity, and in its
    summary how many SAEs there are in which state and the best of each figure.
    """
    import wandb

    files = SweepFolder(folder, folder.name)
    rows = files.read_rows()
    if not rows:
        return False
    config = next(iter(files.read_configs().values()))
    marks = frontier.marks(rows)
    rows = [
        row | {"fvu": frontier.figure(row, "fvu"), "frontier": mark}
        for row, mark in zip(rows, marks, strict=True)
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = wandb.Table(columns=columns, data=[[cell(row.get(c)) for c in columns] for row in rows])
    run = opened(config, "", folder, directory, resume, "sweep")
    logged: dict[str, Any] = {"frontier": table}
    run.summary.update({f"saes/{state}": n for state, n in Counter(states(rows)).items()})
    for figure in ("ce_loss_score", "fvu", "kl_div"):
        judged = [row for row in rows if frontier.judged(row, figure)]
        if not judged:
            continue
        points = wandb.Table(
            columns=["l0", figure, "SAE"],
            data=[[row["l0"], row[figure], row["trial"]] for row in judged],
        )
        logged[f"l0_{figure}"] = wandb.plot.scatter(
            points, "l0", figure, title=f"{folder.name}: L0 against {figure}"
        )
        best = max if frontier.more_is_better(figure) else min
        run.summary.update({f"best/{figure}": best(row[figure] for row in judged)})
    run.log(logged)
    run.finish()
    return True


def states(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(row["status"]) for row in rows]


def cell(value: Any) -> Any:
    """A value as wandb's tables take it: a column has one type."""
    return value if value is None or isinstance(value, (int, float, str)) else str(value)


class WandbRuns:
    """The runs of one sweep. No call waits for wandb but `close`."""

    def __init__(self, folder: Folder, warn: Callable[[str], None]) -> None:
        self.folder = folder
        self.warn = warn
        self.off = os.environ.get("WANDB_MODE") == "disabled"
        self.runs: dict[str, WandbRun] = {}
        self.wanted = False  # by any SAE
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        # wandb writes to a local folder; a sweep's on object storage is kept beside the process.
        self.directory = (
            folder.path if folder.is_local else str(Path(tempfile.gettempdir()) / "saeray-wandb")
        )

    def open(self, name: str, config: LanguageModelSAERunnerConfig) -> None:
        def call() -> None:
            self.runs[name] = WandbRun(config, name, self.folder, self.directory, "allow")

        # wandb is imported and told of them with the first line: until then an SAE has better uses
        # for the time.
        if config.log_to_wandb:
            self.wanted = True
            self.in_line(call)

    def log(self, name: str, metrics: Mapping[str, Any], step: int) -> None:
        def call() -> None:
            if name in self.runs:
                self.runs[name].log(metrics, step)

        if self.wanted:
            self.later(call)

    def finish(self, name: str, failed: bool) -> None:
        def call() -> None:
            if name in self.runs:
                self.runs.pop(name).finish(failed)

        if self.wanted:
            self.later(call)

    def close(self) -> None:
        """Returns when all that was asked for is done, the sweep's own run too; with a limit."""
        if self.thread is None:
            return

        def of_the_sweep() -> None:
            log_sweep(self.folder, self.directory, "allow")

        self.in_line(of_the_sweep)
        done = threading.Event()
        self.calls.put(done.set)
        if not done.wait(CLOSE_SECONDS):
            self.give_up(f"not all was taken within {CLOSE_SECONDS:g} s")

    # --- the thread -------------------------------------------------------------------------

    def later(self, call: Callable[[], None]) -> None:
        """Has a call made, after those that are in line."""
        self.in_line(call)
        if self.thread is None and not self.off:
            # Not a pool's: Python waits for those at its exit, however long they hang.
            self.thread = threading.Thread(target=self.work, name="wandb", daemon=True)
            self.thread.start()

    def in_line(self, call: Callable[[], None]) -> None:
        """Puts a call in line; none that is still in line is made once wandb is given up."""

        def unless_off() -> None:
            if not self.off:
                call()

        if self.calls.qsize() >= MOST_IN_LINE:
            self.give_up(f"it is too slow for this sweep, {MOST_IN_LINE:,} lines wait for it")
        if not self.off:
            self.calls.put(unless_off)

    def work(self) -> None:
        while True:
            call = self.calls.get()
            try:
                call()
            except ImportError:
                self.give_up("not installed")
            except Exception as error:  # of wandb's many kinds
                self.give_up(in_a_line(error))

    def give_up(self, reason: str) -> None:
        if self.off:
            return
        self.off = True
        self.warn(
            f"wandb: {reason}. metrics.jsonl goes on; `saeray wandb {self.folder.uri}` sends all "
            "of it later."
        )


def in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def send_whole(folder: Folder) -> list[str]:
    """Every SAE of a sweep as one whole wandb run, from its metrics.jsonl; their names.

    What a run of the same sweep and SAE already has is replaced. Where to, and whether online or
    into files, is up to wandb's own environment variables.

    Raises:
        ConfigError: no sweep is there, or no wandb.
        SaerayError: wandb does not take one of them.
    """
    files = SweepFolder(folder, folder.name)
    configs = files.read_configs()
    known = files.known(list(configs))
    sent = []
    for name, config in configs.items():
        lines = read_lines(folder / "trials" / name)
        if not lines:
            continue
        try:
            run = WandbRun(config, name, folder, os.environ.get("WANDB_DIR"), None)
            for line in lines:
                run.log(line, line.pop("step"))
            run.finish(known[name].state == FAILED)
        except ImportError:
            raise ConfigError("wandb is not installed: pip install wandb.") from None
        except Exception as error:  # of wandb's many kinds
            raise SaerayError(f"wandb does not take {name}: {in_a_line(error)}.") from error
        sent.append(name)
    try:
        if sent and log_sweep(folder, os.environ.get("WANDB_DIR"), None):
            sent.append(f"{folder.name} as a whole")
    except Exception as error:
        raise SaerayError(f"wandb does not take the sweep's run: {in_a_line(error)}.") from error
    return sent
