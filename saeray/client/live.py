"""The live view of a running sweep: a table on a terminal, an output that changes in a notebook,
plain lines anywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from rich.console import Console, ConsoleDimensions, Group
from rich.live import Live
from rich.text import Text

from saeray.client import ending
from saeray.client.live_table import lines_of
from saeray.client.notebook import Output
from saeray.client.speed import bottleneck, duration, human
from saeray.errors import Late, printable
from saeray.spec.messages import ENDS, SweepStatus

LINE_SECONDS = 10.0  # between plain lines
LOOK_SECONDS = 1.0
# The stretch of time that a rate is of: LM tokens, SAE-tokens.
HARVEST_SECONDS, TRAIN_SECONDS = 15.0, 30.0
SEEN_SECONDS = 10.0  # of training, before it is said how long the rest will take
NOTEBOOK_SIZE = 110, 40  # columns, lines


class Rates:
    """Tokens per second over the last stretch of looks.

    Reports come every few steps, so what is trained grows in jumps: speed is measured from one jump
    to another, not from a look to a look.
    """

    def __init__(self) -> None:
        self.looks: list[tuple[float, int]] = []  # when, LM tokens
        self.jumps: list[tuple[float, int]] = []  # when, SAE-tokens

    def add(self, now: float, status: SweepStatus) -> None:
        self.looks.append((now, status.harvested_tokens))
        self.looks = [look for look in self.looks if now - look[0] <= HARVEST_SECONDS]
        if not self.jumps or status.trained_tokens != self.jumps[-1][1]:
            self.jumps.append((now, status.trained_tokens))
            recent = [jump for jump in self.jumps if now - jump[0] <= TRAIN_SECONDS]
            self.jumps = recent if len(recent) >= 3 else self.jumps[-3:]

    def per_second(self) -> tuple[float, float]:
        """Harvested tokens and SAE-tokens per second."""
        return slope(self.looks), slope(self.jumps)

    def time_left(self, status: SweepStatus, now: float) -> float | None:
        """Seconds until all SAEs are trained, at the present rate; None: too early, or they are."""
        trained = slope(self.jumps)
        left = tokens_left(status)
        if not left or trained <= 0 or self.jumps[-1][0] - self.jumps[0][0] < SEEN_SECONDS:
            return None
        return max(0.0, left / trained - (now - self.jumps[-1][0]))


def slope(points: list[tuple[float, int]]) -> float:
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return 0.0
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])


def tokens_left(status: SweepStatus) -> float | None:
    """SAE-tokens that are still to be trained on; None before the first step of any."""
    batches = [row.n_training_tokens / row.step for row in status.rows if row.step]
    if not batches:
        return None
    usual = sum(batches) / len(batches)
    return sum(
        (row.total_steps - row.step) * (row.n_training_tokens / row.step if row.step else usual)
        for row in status.rows
        if row.state not in ENDS
    )


def summary(status: SweepStatus, rates: Rates) -> list[str]:
    """What is said below the table, part by part."""
    harvested, trained = rates.per_second()
    used = sum(g.used for g in status.gauges)
    slots = sum(g.slots for g in status.gauges)
    cached = f" + {human(status.cached_tokens)} from cache" if status.cached_tokens else ""
    parts = []
    if status.trained_tokens or status.harvested_tokens:
        parts = [
            f"trained {human(status.trained_tokens)} SAE-tokens ({human(trained)}/s)",
            f"harvested {human(status.harvested_tokens)} ({human(harvested)}/s){cached}",
            f"buffer {used}/{slots} blocks",
        ]
    limit = bottleneck(status)
    if limit != status.phase:
        parts.append(limit)
    if status.epochs > 1:
        parts.append(f"epoch {status.epochs} of the text")
    if status.skipped_rows:
        parts.append(f"{status.skipped_rows:,} empty rows skipped")
    return parts


def plain_line(status: SweepStatus, rates: Rates, now: float, elapsed: float) -> str:
    """The sweep in a line, for a log."""
    left = rates.time_left(status, now)
    parts = [f"{duration(left)} left"] if left is not None else []
    said = printable(status.error or "") or " · ".join(parts + summary(status, rates))
    return f"{duration(elapsed):>6} {status.phase}{': ' if said else ''}{said}"


class LiveView:
    """Looks at the sweep from a thread of its own while Tune has the main one."""

    def __init__(
        self,
        look: Callable[[], SweepStatus],
        live: bool,
        watched: Callable[[SweepStatus], None] | None = None,
        console: Console | None = None,
    ) -> None:
        """watched: is told every status that was looked at. console: default, stderr's."""
        self.look = look
        self.watched = watched
        self.live = live
        self.status = SweepStatus(rows=[], phase="starting")
        self.rates = Rates()
        self.started = time.monotonic()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.run, name="live view", daemon=True)
        self.console = console or Console(file=sys.stderr, force_jupyter=False)
        self.size: ConsoleDimensions | None = None  # of the terminal, as it was drawn for
        self.output = Output.wanted() if live else None

    def __enter__(self) -> LiveView:
        if self.output is not None:
            self.output.begin()  # here, since a cell's output belongs to the thread that runs it
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

    def all_ended(self) -> bool:
        """Whether the sweep's SAEs have, as of the last look."""
        rows = self.status.rows
        return bool(rows) and all(row.state in ENDS for row in rows)

    def take_a_look(self) -> None:
        since = self.status.training_since
        self.status = self.look()
        if since is not None:  # a roster that was started again does not know
            self.status.training_since = since

    def run(self) -> None:
        if self.live and self.output is not None:
            self.run_in_notebook(self.output)
        elif self.live and self.console.is_terminal:
            with self.on_screen() as live:
                ending.undrawn = live.stop
                try:
                    while not self.stop.wait(LOOK_SECONDS):
                        self.refresh(live)
                    self.refresh(live)
                finally:
                    ending.undrawn = None
        else:
            self.run_in_lines()

    def on_screen(self) -> Live:
        """What is drawn anew by `refresh`, on the console, above whatever else is printed."""
        return Live(
            console=self.console, auto_refresh=False, transient=False, vertical_overflow="crop"
        )

    def run_in_lines(self) -> None:
        said, phase, placement = 0.0, "", ""
        while not self.stop.wait(LOOK_SECONDS):
            if not self.updated() or not self.live:
                continue
            now = time.monotonic()
            if self.status.placement not in ("", placement):
                placement = self.status.placement
                self.say(f"        {placement}")
            if now - said > LINE_SECONDS or self.status.phase != phase:
                said, phase = now, self.status.phase
                self.say(plain_line(self.status, self.rates, now, now - self.started))

    def run_in_notebook(self, output: Output) -> None:
        while True:
            last = self.stop.wait(LOOK_SECONDS)
            if self.updated():
                output.show([line.plain for line in self.lines(*NOTEBOOK_SIZE)])
            if last:
                return

    def updated(self) -> bool:
        try:
            self.update()
        except (Late, RuntimeError):
            return False  # the roster is busy; the next look will tell
        return True

    def say(self, line: str) -> None:
        # No markup: the text may have come from a dataset.
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def lines(self, width: int, height: int) -> list[Text]:
        now = time.monotonic()
        left = self.rates.time_left(self.status, now)
        said = summary(self.status, self.rates)
        return lines_of(self.status, said, left, now - self.started, width, height)

    def refresh(self, live: Live) -> None:
        if not self.updated() or not live.is_started:  # its end was said: see `ending`
            return
        size = self.console.size
        if self.size not in (None, size):
            # What was drawn for another width may lie on other lines now: from a clean screen.
            self.console.clear()
            live._live_render._shape = None
        self.size = size
        live.update(Group(*self.lines(size.width, size.height - 1)), refresh=True)

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
