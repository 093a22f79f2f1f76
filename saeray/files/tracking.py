"""Where metrics go: always a metrics.jsonl per SAE, and one wandb run per SAE where wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saeray.files.metrics_log import MetricsLog
from saeray.files.storage import Folder
from saeray.files.wandb_runs import WandbRuns
from saeray.spec.config import LanguageModelSAERunnerConfig


class Tracker:
    """All SAEs of a sweep. Used from one thread, so a slow disk delays nothing but itself."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.logs: dict[str, MetricsLog] = {}
        self.open_logs: set[str] = set()
        self.warnings: list[str] = []
        self.wandb = WandbRuns(folder, self.warnings.append)

    def open(self, name: str, config: LanguageModelSAERunnerConfig) -> None:
        self.logs[name] = MetricsLog(self.folder / "trials" / name)
        self.open_logs.add(name)
        self.wandb.open(name, config)

    def log(self, name: str, step: int, metrics: Mapping[str, Any], last: bool = False) -> int:
        """Writes a line; the step up to which all are where they survive this process."""
        log = self.logs[name]
        if log.append(step, metrics, last):
            self.wandb.log(name, metrics, step)
        if last:
            log.flush()
        return log.written_step

    def flush(self, name: str) -> int:
        """Writes what waits to be written; the step up to which all lines survive this process."""
        self.logs[name].flush()
        return self.logs[name].written_step

    def finish(self, name: str, failed: bool) -> None:
        if name not in self.open_logs:  # it had ended before this session, or has ended before
            return
        self.open_logs.discard(name)
        self.logs[name].flush()
        self.wandb.finish(name, failed)

    def close(self) -> None:
        for name in sorted(self.open_logs):
            self.finish(name, failed=False)
        self.wandb.close()
