"""Policy: which blocks the activation buffer harvests, keeps and releases. Plain data, no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from saeray.spec.order import StreamOrder

LAG_SECONDS = 300.0  # how long fast readers wait for a slow one, in all, before it is on its own


@dataclass
class ReaderState:
    """One rank of one pack."""

    window: int  # the one it reads or asks for; earlier ones it has done with
    asks_since: float | None = None  # since when it waits for that window
    detached: bool = False  # too far behind; its blocks are harvested for it alone
    blocks_since: float | None = None  # since when others wait for it
    blocked: float = 0.0  # seconds they have waited for it before that


@dataclass
class Policy:
    """Decides what to harvest, keep and release. No Ray, no clock of its own.

    Attached readers share one stretch of the stream, from the slowest one's window to ahead of the
    fastest one's, as far as slots reach. A reader that others have waited for too long, in all or
    (`at_a_time`) for one window, is detached:
    while there are such readers the shared stretch gives up one group of slots, and the detached
    reader that has waited longest gets the two groups its window needs. So the bound is exceeded
    by at most one group, and a slow reader stops the others for no longer than `LAG_SECONDS`.
    """

    order: StreamOrder
    slots: int
    at_a_time: bool = False  # for readers that share cores, where one that waits costs nothing
    readers: dict[str, ReaderState] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)  # blocks under way or ready
    ready: set[int] = field(default_factory=set)

    def window_blocks(self, reader: ReaderState) -> range:
        return self.order.blocks_of(min(reader.window, self.order.n_windows - 1))

    def has(self, reader: ReaderState) -> bool:
        """Whether the window it reads or asks for is there."""
        return self.is_ready(min(reader.window, self.order.n_windows - 1))

    def is_ready(self, window: int) -> bool:
        return self.ready.issuperset(self.order.blocks_of(window))

    def served_alone(self) -> ReaderState | None:
        """The detached reader whose turn it is: of those that wait, the one waiting longest."""
        waiting = [
            r
            for r in self.readers.values()
            if r.detached and r.asks_since is not None and not self.has(r)
        ]
        return min(waiting, key=lambda r: r.asks_since or 0.0, default=None)

    def stretch(self) -> range:
        """The blocks that attached readers share: from the slowest one's window, as slots reach."""
        windows = self.windows()
        if not windows:
            return range(0)
        reach = self.slots
        if any(r.detached for r in self.readers.values()):
            group = self.order.group_blocks
            reach = max(2 * group, self.slots + group - max(2 * group, len(self.apart())))
        slowest = self.order.blocks_of(windows[0]).start
        return range(slowest, min(slowest + reach, self.order.n_blocks))

    def windows(self) -> list[int]:
        """The windows of attached readers, each once, from the slowest one's on."""
        last = self.order.n_windows - 1
        return sorted({min(r.window, last) for r in self.readers.values() if not r.detached})

    def apart(self) -> set[int]:
        """Held blocks of detached readers: those being read, and those of the one whose turn it is.

        A half-filled window of any other is given up, or two readers could wait for each other.
        """
        blocks: set[int] = set()
        turn = self.served_alone()
        for r in self.readers.values():
            if r.detached and (r is turn or self.has(r)):
                blocks.update(self.window_blocks(r))
        return blocks & self.held

    def kept(self) -> set[int]:
        return self.held.intersection(self.stretch()) | self.apart()

    def next_block(self) -> int | None:
        """What to harvest now: what is asked for first, then ahead of the fastest reader."""
        stretch = self.stretch()
        windows = self.windows()
        for window in windows:
            for block in self.order.blocks_of(window):
                if block not in self.held and block in stretch:
                    return block
        turn = self.served_alone()
        if turn is not None:
            lacking = set(self.window_blocks(turn)) - self.held
            if lacking and len(self.apart()) < 2 * self.order.group_blocks:
                return min(lacking)
        ahead = max(stretch.start, self.order.blocks_of(windows[-1]).stop) if windows else 0
        return next((b for b in range(ahead, stretch.stop) if b not in self.held), None)

    def stragglers(self) -> set[str]:
        """Attached readers at the oldest window, while another's window is out of slots' reach."""
        windows = self.windows()
        if not windows or self.order.blocks_of(windows[-1]).stop <= self.stretch().stop:
            return set()
        slowest = min(r.window for r in self.readers.values() if not r.detached)
        return {n for n, r in self.readers.items() if not r.detached and r.window == slowest}

    def watch_lag(self, now: float, limit: float = LAG_SECONDS) -> list[str]:
        """Detaches readers that others have waited for longer than `limit` in all; names them.

        In all, since one that is a little too slow makes them wait a little at every window.
        """
        behind = self.stragglers()
        detached = []
        for name, r in self.readers.items():
            if r.blocks_since is not None:
                r.blocked += now - r.blocks_since
            r.blocks_since = now if name in behind else None
            if r.blocked > limit and name in behind:
                r.detached, r.blocks_since, r.blocked = True, None, 0.0
                detached.append(name)
        return detached

    def welcome(self, name: str, window: int) -> None:
        """A new reader; detached at once where the others are ahead of it by more than slots."""
        reader = ReaderState(window)
        windows = self.windows()
        if windows:
            slowest = self.order.blocks_of(windows[0]).start
            reader.detached = self.window_blocks(reader).start + self.slots <= slowest
        self.readers[name] = reader

    def ask(self, name: str, window: int, now: float) -> ReaderState:
        """A reader asks for a window and has done with all before it."""
        r = self.readers.setdefault(name, ReaderState(window))
        if r.window != window or r.asks_since is None:
            if self.at_a_time and r.window != window:
                r.blocks_since, r.blocked = None, 0.0
            r.window, r.asks_since = window, now
        if r.detached:
            others = [o.window for n, o in self.readers.items() if n != name and not o.detached]
            r.detached = bool(others) and window < min(others)  # or it has caught up
        return r
