"""Where metrics go: always a metrics.jsonl per SAE, and one wandb run per SAE where wanted.

wandb runs are opened and finished by our own process and written into the sweep's folder. Only
wandb's own errors are caught: one warning, the JSONL goes on, and `wandb sync` can follow later.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from saeray.files.metrics_log import MetricsLog
from saeray.files.storage import Folder
from saeray.spec.config import LanguageModelSAERunnerConfig, digest

logger = logging.getLogger(__name__)


class Run(Protocol):
    """One SAE's place to log to."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None: ...

    def finish(self, failed: bool) -> None: ...


class NoRun:
    """log_to_wandb: false, or no wandb to be had."""

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        pass

    def finish(self, failed: bool) -> None:
        pass


class WandbRun:
    """One wandb run in its own folder; several may be open in one process."""

    def __init__(self, config: LanguageModelSAERunnerConfig, name: str, sweep: str, folder: str):
        import wandb

        self.wandb = wandb
        self.broken = False
        os.makedirs(folder, exist_ok=True)
        self.run = wandb.init(
            id=digest({"sweep": folder, "name": name}, 16),
            name=name,
            group=sweep,
            project=config.wandb_project,
            entity=config.wandb_entity,
            config=config.to_dict(),
            dir=folder,
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off", init_timeout=60),
        )

    def log(self, metrics: Mapping[str, Any], step: int) -> None:
        values = dict(metrics)
        histogram = values.pop("plots/feature_density_line_chart", None)
        if histogram is not None:
            values["plots/feature_density_line_chart"] = self.wandb.Histogram(
                np_histogram=(histogram["counts"], histogram["edges"])
            )
        self.guarded(lambda: self.run.log(values, step=step))

    def finish(self, failed: bool) -> None:
        self.guarded(lambda: self.run.finish(exit_code=int(failed)))

    def guarded(self, call: Any) -> None:
        if self.broken:
            return
        try:
            call()
        except (self.wandb.Error, OSError) as error:
            self.broken = True
            logger.warning("wandb: %s; metrics.jsonl goes on, `wandb sync` can follow.", error)


def open_run(
    config: LanguageModelSAERunnerConfig, name: str, sweep: str, folder: Folder
) -> tuple[Run, str | None]:
    """The run of one SAE, and a warning where wandb was wanted but can't be had."""
    if not config.log_to_wandb or os.environ.get("WANDB_MODE") == "disabled":
        return NoRun(), None
    try:
        import wandb
    except ImportError:
        return NoRun(), "log_to_wandb: wandb is not installed; logging to metrics.jsonl only."
    # wandb writes to a local folder; for a sweep on object storage it is kept beside the process.
    local = folder.path if folder.is_local else str(Path(tempfile.gettempdir()) / "saeray-wandb")
    try:
        return WandbRun(config, name, sweep, local), None
    except (wandb.Error, OSError) as error:
        return NoRun(), f"wandb: {error} (metrics.jsonl goes on)."


class Tracker:
    """All SAEs of a sweep. Used from one thread, so a slow wandb delays nothing but itself."""

    def __init__(self, sweep: str, folder: Folder) -> None:
        self.sweep = sweep
        self.folder = folder
        self.logs: dict[str, MetricsLog] = {}
        self.runs: dict[str, Run] = {}
        self.warnings: list[str] = []

    def open(self, name: str, config: LanguageModelSAERunnerConfig) -> None:
        self.logs[name] = MetricsLog(self.folder / "trials" / name)
        self.runs[name], warning = open_run(config, name, self.sweep, self.folder)
        if warning and warning not in self.warnings:
            self.warnings.append(warning)

    def log(self, name: str, step: int, metrics: Mapping[str, Any], last: bool = False) -> int:
        """Writes a line; the step up to which all are where they survive this process."""
        log = self.logs[name]
        if log.append(step, metrics):
            self.runs[name].log(metrics, step)
        if last:
            log.flush()
        return log.written_step

    def flush(self, name: str) -> int:
        """Writes what waits to be written; the step up to which all lines survive this process."""
        self.logs[name].flush()
        return self.logs[name].written_step

    def finish(self, name: str, failed: bool) -> None:
        if name not in self.runs:  # it had ended before this session
            return
        self.logs[name].flush()
        self.runs[name].finish(failed)
        self.runs[name] = NoRun()

    def close(self) -> None:
        for name in list(self.runs):
            self.finish(name, failed=False)
