"""The live view of a running sweep: a compact table, or plain lines when not on a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from saeray.client.speed import bottleneck, duration, human
from saeray.errors import Late, printable
from saeray.spec.messages import ENDS, SweepStatus

LINE_SECONDS = 10.0  # between plain lines
LOOK_SECONDS = 1.0


class Rates:
    """Tokens per second over the last stretch of looks."""

    def __init__(self) -> None:
        self.looks: list[tuple[float, int, int]] = []

    def add(self, now: float, status: SweepStatus) -> None:
        self.looks.append((now, status.harvested_tokens, status.trained_tokens))
        self.looks = [look for look in self.looks if now - look[0] <= 15.0]

    def per_second(self) -> tuple[float, float]:
        """LM tokens and SAE-tokens per second."""
        if len(self.looks) < 2 or self.looks[-1][0] <= self.looks[0][0]:
            return 0.0, 0.0
        (t0, h0, s0), (t1, h1, s1) = self.looks[0], self.looks[-1]
        return (h1 - h0) / (t1 - t0), (s1 - s0) / (t1 - t0)


def time_left(status: SweepStatus, trained_per_second: float) -> float | None:
    """Seconds until all SAEs are trained, at the present rate."""
    left = 0.0
    for row in status.rows:
        if row.state not in ENDS and row.total_steps:
            per_step = row.n_training_tokens / row.step if row.step else None
            if per_step is None:
                return None
            left += (row.total_steps - row.step) * per_step
    return left / trained_per_second if trained_per_second > 0 else None


def summary(status: SweepStatus, rates: Rates) -> str:
    """The line below the table."""
    harvested, trained = rates.per_second()
    used = sum(g.used for g in status.gauges)
    slots = sum(g.slots for g in status.gauges)
    left = time_left(status, trained)
    cached = f" + {human(status.cached_tokens)} from cache" if status.cached_tokens else ""
    parts = [
        f"harvested {human(status.harvested_tokens)} ({human(harvested)}/s){cached}",
        f"trained {human(status.trained_tokens)} SAE-tokens ({human(trained)}/s)",
        f"buffer {used}/{slots} blocks",
        bottleneck(status),
    ]
    if status.epochs > 1:
        parts.append(f"epoch {status.epochs} of the text")
    if status.skipped_rows:
        parts.append(f"{status.skipped_rows:,} empty rows skipped")
    if left is not None:
        parts.append(f"{duration(left)} left")
    return " · ".join(parts)


def draw(status: SweepStatus, rates: Rates, elapsed: float) -> Group:
    """The whole view."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("SAE", "state"):
        table.add_column(column)
    for column in ("tokens", "loss", "L0", "expl. var.", "CE score", "dead"):
        table.add_column(column, justify="right")

    def figure(metrics: dict[str, Any], key: str, form: str) -> str:
        return "–" if metrics.get(key) is None else format(metrics[key], form)

    for row in status.rows:
        m = row.metrics
        share = row.step / row.total_steps if row.total_steps else 0.0
        table.add_row(
            Text(row.name),
            Text(row.state, style={"failed": "red", "done": "green"}.get(row.state, "")),
            f"{human(row.n_training_tokens)} {share:4.0%}",
            figure(m, "losses/overall_loss", ".4g"),
            figure(m, "metrics/l0", ".1f"),
            figure(m, "metrics/explained_variance", ".3f"),
            figure(m, "metrics/CE_loss_score", ".3f"),
            figure(m, "sparsity/dead_features", "d"),
        )
    notes = [Text(f"! {w}", style="yellow") for w in status.warnings[-3:]]
    head = Text(f"{status.phase} · {duration(elapsed)}")
    if status.placement:
        head.append(f"\n{status.placement}", style="dim")
    if status.error:
        return Group(head, Text(printable(status.error), style="red"))
    return Group(head, table, Text(summary(status, rates)), *notes)


class LiveView:
    """Looks at the sweep from a thread of its own while Tune has the main one."""

    def __init__(
        self,
        look: Callable[[], SweepStatus],
        live: bool,
        watched: Callable[[SweepStatus], None] | None = None,
    ) -> None:
        """watched: is told every status that was looked at."""
        self.look = look
        self.watched = watched
        self.live = live
        self.status = SweepStatus(rows=[], phase="starting")
        self.rates = Rates()
        self.started = time.monotonic()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, name="live view", daemon=True)
        self.console = Console(file=sys.stderr)

    def __enter__(self) -> LiveView:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join(timeout=10)

    def update(self) -> None:
        self.take_a_look()
        self.status.warnings = [printable(w) for w in self.status.warnings]
        self.rates.add(time.monotonic(), self.status)
        if self.watched is not None:
            self.watched(self.status)

    def take_a_look(self) -> None:
        since = self.status.training_since
        self.status = self.look()
        if since is not None:  # a roster that was started again does not know
            self.status.training_since = since

    def run(self) -> None:
        if self.live and self.console.is_terminal:
            with Live(console=self.console, auto_refresh=False, transient=False) as live:
                while not self.stop.wait(LOOK_SECONDS):
                    self.refresh(live)
                self.refresh(live)
            return
        said, phase, placement = 0.0, "", ""
        while not self.stop.wait(LOOK_SECONDS):
            try:
                self.update()
            except (Late, RuntimeError):
                continue
            now = time.monotonic()
            if self.live and self.status.placement not in ("", placement):
                placement = self.status.placement
                self.say(f"        {placement}")
            if self.live and (now - said > LINE_SECONDS or self.status.phase != phase):
                said, phase = now, self.status.phase
                elapsed = duration(now - self.started)
                what = printable(self.status.error or "") or summary(self.status, self.rates)
                self.say(f"{elapsed:>6} {phase}: {what}")

    def say(self, line: str) -> None:
        # No markup: the text may have come from a dataset.
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def refresh(self, live: Live) -> None:
        try:
            self.update()
        except (Late, RuntimeError):
            return  # the roster is busy; the next look will tell
        live.update(draw(self.status, self.rates, time.monotonic() - self.started), refresh=True)

    def wait_for_training(self) -> None:
        """Until the first optimizer step is done, or it is known that there will be none."""
        while self.thread.is_alive():
            begun = self.status.training_since is not None or self.status.error is not None
            if begun or all(row.state in ENDS for row in self.status.rows):
                return
            time.sleep(0.1)

    def wait_for_end(self, limit_s: float) -> None:
        """Until every SAE has reached an end (those Tune stopped are still being evaluated)."""
        deadline = time.monotonic() + limit_s
        while True:
            self.take_a_look()
            if all(row.state in ENDS for row in self.status.rows):
                return
            if time.monotonic() > deadline:
                late = [r.name for r in self.status.rows if r.state not in ENDS]
                raise Late(f"{', '.join(late)} did not come to an end within {limit_s:g} s.")
            time.sleep(0.2)
