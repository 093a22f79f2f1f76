"""ActivationBuffer: which blocks exist, who still needs them, and what to harvest next.

One async actor per stream. It holds references, never bytes. A block's life:

    wanted ──admit──► under way ──harvested──► ready ──every reader past it──► released
             (a slot is charged)                            (the slot is free again)

Slots are blocks; their number is the buffer's bound in bytes. Readers ask for windows by number
and name the oldest window they still hold, so asking twice is harmless. `Policy` below decides and
is plain data; the actor acts.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from saeray.errors import ConfigError, SaerayError
from saeray.messages import Gauges
from saeray.shuffle import StreamOrder

IN_FLIGHT = 2  # blocks under way per harvester: one running, one waiting at its door
POLL_SECONDS = 2.0  # a call never waits longer than this; callers ask again
LAG_SECONDS = 60.0  # how long fast readers wait for a slow one before it is on its own


@dataclass
class ReaderState:
    """One rank of one pack."""

    window: int  # the one it reads or asks for; earlier ones it has done with
    asks_since: float | None = None  # since when it waits for that window
    detached: bool = False  # too far behind; its blocks are harvested for it alone
    blocks_since: float | None = None  # since when others wait for it


class WindowBlocks(NamedTuple):
    """What a reader gets: the references of a window's blocks, in order of the stream.

    They travel inside lists, so Ray does not fetch them on the way.
    """

    blocks: range
    refs: list[Any]


@dataclass
class Policy:
    """Decides what to harvest, keep and release. No Ray, no clock of its own.

    Attached readers share one stretch of the stream, from the slowest one's window to ahead of the
    fastest one's, as far as slots reach. A reader that others have waited for too long is detached:
    while there are such readers the shared stretch gives up one group of slots, and the detached
    reader that has waited longest gets the two groups its window needs. So the bound is exceeded
    by at most one group, and a slow reader stops the others for no longer than `LAG_SECONDS`.
    """

    order: StreamOrder
    slots: int
    readers: dict[str, ReaderState] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)  # blocks under way or ready
    ready: set[int] = field(default_factory=set)

    def window_blocks(self, reader: ReaderState) -> set[int]:
        return set(self.order.blocks_of(min(reader.window, self.order.n_windows - 1)))

    def attached(self) -> dict[str, ReaderState]:
        return {n: r for n, r in self.readers.items() if not r.detached}

    def served_alone(self) -> ReaderState | None:
        """The detached reader whose turn it is: of those that wait, the one waiting longest."""
        waiting = [
            r
            for r in self.readers.values()
            if r.detached and r.asks_since is not None and not self.window_blocks(r) <= self.ready
        ]
        return min(waiting, key=lambda r: r.asks_since or 0.0, default=None)

    def stretch(self) -> range:
        """The blocks that attached readers share: from the slowest one's window, as slots reach."""
        attached = self.attached().values()
        if not attached:
            return range(0)
        reach = self.slots
        if len(attached) < len(self.readers):  # some are detached
            group = self.order.group_blocks
            reach = max(2 * group, self.slots + group - max(2 * group, len(self.apart())))
        slowest = min(min(self.window_blocks(r)) for r in attached)
        return range(slowest, min(slowest + reach, self.order.n_blocks))

    def apart(self) -> set[int]:
        """Held blocks of detached readers: those being read, and those of the one whose turn it is.

        A half-filled window of any other is given up, or two readers could wait for each other.
        """
        blocks: set[int] = set()
        turn = self.served_alone()
        for r in self.readers.values():
            if r.detached and (r is turn or self.window_blocks(r) <= self.ready):
                blocks |= self.window_blocks(r)
        return blocks & self.held

    def kept(self) -> set[int]:
        return (self.held & set(self.stretch())) | self.apart()

    def next_block(self) -> int | None:
        """What to harvest now: what is asked for first, then ahead of the fastest reader."""
        stretch = self.stretch()
        attached = self.attached().values()
        missing = set().union(*map(self.window_blocks, attached)) - self.held
        missing &= set(stretch)
        if missing:
            return min(missing)
        turn = self.served_alone()
        if turn is not None:
            lacking = self.window_blocks(turn) - self.held
            if lacking and len(self.apart()) < 2 * self.order.group_blocks:
                return min(lacking)
        front = max((max(self.window_blocks(r)) for r in attached), default=0)
        return next((b for b in stretch if b > front and b not in self.held), None)

    def stragglers(self) -> set[str]:
        """Attached readers at the oldest window, while another's window is out of slots' reach."""
        attached = self.attached()
        stretch = self.stretch()
        if not any(max(self.window_blocks(r)) >= stretch.stop for r in attached.values()):
            return set()
        slowest = min(r.window for r in attached.values())
        return {name for name, r in attached.items() if r.window == slowest}

    def watch_lag(self, now: float, limit: float = LAG_SECONDS) -> list[str]:
        """Detaches readers that others have waited for longer than `limit`; names them."""
        behind = self.stragglers()
        detached = []
        for name, r in self.readers.items():
            if name not in behind:
                r.blocks_since = None
            elif r.blocks_since is None:
                r.blocks_since = now
            elif now - r.blocks_since > limit:
                r.detached, r.blocks_since = True, None
                detached.append(name)
        return detached

    def ask(self, name: str, window: int, now: float) -> ReaderState:
        """A reader asks for a window and has done with all before it."""
        r = self.readers.setdefault(name, ReaderState(window))
        if r.window != window or r.asks_since is None:
            r.window, r.asks_since = window, now
        others = [o.window for n, o in self.attached().items() if n != name]
        if r.detached and (not others or window >= min(others)):
            r.detached = False  # caught up
        return r


class ActivationBuffer:
    """The actor: carries out what `Policy` decides."""

    def __init__(
        self,
        order: StreamOrder,
        slots: int,
        hook_points: list[str],
        token_server: Any,
        harvesters: list[Any],
    ) -> None:
        self.policy = Policy(order, slots)
        self.order = order
        self.hook_points = hook_points
        self.token_server = token_server
        self.harvesters = harvesters
        self.in_flight = [0] * len(harvesters)
        self.blocks: dict[int, list[Any]] = {}  # one reference per hook point
        self.changed = asyncio.Event()
        self.error: Exception | None = None
        self.harvested_tokens = 0
        self.harvest_seconds = 0.0
        self.started: float | None = None
        self.b_dec: dict[tuple[Any, ...], asyncio.Future[Any]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.detached: list[str] = []

    # --- what readers and the roster call ---------------------------------------------------

    async def expect(self, reader: str, window: int) -> None:
        """Announces a reader that will start at `window`: its blocks are kept from now on."""
        self.policy.readers.setdefault(reader, ReaderState(window))
        self.pump()

    async def window(self, reader: str, window: int) -> WindowBlocks | None:
        """The blocks of a window; all before it the reader has done with, and they are released.

        Returns None after `POLL_SECONDS` when the window is not ready: ask again.

        Raises:
            SaerayError: the stream can't go on; says why.
        """
        self.policy.ask(reader, window, time.monotonic())
        blocks = self.order.blocks_of(window)
        if not await self.until_ready(blocks):
            return None
        self.policy.readers[reader].asks_since = None
        return WindowBlocks(blocks, [self.blocks[b] for b in blocks])

    async def leave(self, reader: str) -> None:
        """A reader that is done, or gone: nothing is kept for it any more."""
        self.policy.readers.pop(reader, None)
        self.pump()

    async def initial_b_dec(
        self, hook_point: str, method: str, n_rows: int, seed: int
    ) -> Any | None:
        """b_dec [D] from the first half buffer, computed once; None: not there yet, ask again."""
        key = (hook_point, method, n_rows, seed)
        if key not in self.b_dec:
            name = f"initial b_dec at {hook_point}"
            reader = self.policy.ask(name, 0, time.monotonic())
            reader.detached = all(r.window > 1 for r in self.policy.readers.values() if r != reader)
            if not await self.until_ready(self.order.blocks_of(0)):
                return None
            if key not in self.b_dec:  # no other call came first while this one waited
                at = self.hook_points.index(hook_point)
                refs = [self.blocks[b][at] for b in self.order.blocks_of(0)]
                self.b_dec[key] = asyncio.ensure_future(
                    self.sampled_b_dec(method, n_rows, seed, refs)
                )
                self.policy.readers.pop(name, None)
        done, _ = await asyncio.wait([self.b_dec[key]], timeout=POLL_SECONDS)
        return self.b_dec[key].result() if done else None

    async def sampled_b_dec(self, method: str, n_rows: int, seed: int, refs: list[Any]) -> Any:
        return await self.harvesters[0].initial_b_dec.remote(method, n_rows, seed, *refs)

    async def gauges(self) -> Gauges:
        return Gauges(
            harvested_tokens=self.harvested_tokens,
            slots=self.policy.slots,
            used=len(self.policy.held),
            ready=len(self.policy.ready),
            harvest_seconds=self.harvest_seconds,
            elapsed_seconds=0.0 if self.started is None else time.monotonic() - self.started,
            n_harvesters=len(self.harvesters),
            readers={name: r.window for name, r in self.policy.readers.items()},
            detached=list(self.detached),
        )

    # --- acting -----------------------------------------------------------------------------

    def pump(self) -> None:
        """Releases what no reader needs and submits harvests while slots and harvesters last."""
        kept = self.policy.kept()
        for block in self.policy.ready - kept:
            self.policy.ready.discard(block)
            self.policy.held.discard(block)
            del self.blocks[block]  # the last reference here; Ray frees the memory
        self.detached += self.policy.watch_lag(time.monotonic())
        while self.error is None:
            at = min(range(len(self.harvesters)), key=self.in_flight.__getitem__)
            if self.in_flight[at] >= IN_FLIGHT:
                return
            wanted = self.policy.next_block()
            if wanted is None:
                return
            self.submit(wanted, at)

    def submit(self, block: int, at: int) -> None:
        if self.started is None:
            self.started = time.monotonic()
        self.policy.held.add(block)
        self.in_flight[at] += 1
        tokens = self.token_server.block.remote(block)
        meta, *refs = (
            self.harvesters[at]
            .harvest.options(num_returns=1 + len(self.hook_points))
            .remote(block, tokens)
        )
        self.blocks[block] = refs
        task = asyncio.ensure_future(self.harvested(block, at, meta))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def harvested(self, block: int, at: int, meta: Any) -> None:
        try:
            done = await meta
        except Exception as error:
            self.error = error
        else:
            self.policy.ready.add(block)
            self.harvested_tokens += done.n_tokens
            self.harvest_seconds += done.seconds
        finally:
            self.in_flight[at] -= 1
            self.changed.set()
            self.changed = asyncio.Event()
            self.pump()

    def fail_if_broken(self) -> None:
        if self.error is None:
            return
        cause = getattr(self.error, "cause", None)
        if isinstance(cause, ConfigError):
            raise cause
        raise SaerayError(f"the activation stream broke off: {self.error}")

    async def until_ready(self, blocks: range) -> bool:
        """Waits for blocks, `POLL_SECONDS` at most; whether they are all there."""
        deadline = time.monotonic() + POLL_SECONDS
        while True:
            self.pump()
            self.fail_if_broken()
            if all(b in self.policy.ready for b in blocks):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            try:
                await asyncio.wait_for(self.changed.wait(), left)
            except (TimeoutError, asyncio.TimeoutError):
                return False
