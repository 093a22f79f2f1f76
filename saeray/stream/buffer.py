"""ActivationBuffer: which blocks exist, who still needs them, and what to harvest next.

One async actor per stream. It holds references, never bytes. A block's life:

    wanted ──admit──► under way ──harvested──► ready ──every reader past it──► released
             (a slot is charged)                            (the slot is free again)

Slots are blocks; their number is the buffer's bound in bytes. Readers ask for windows by number
and name the oldest window they still hold, so asking twice is harmless. `Policy` decides and is
plain data; the actor acts, and `HarvesterPool` has the blocks made.

Every block is a function of its index, so nothing here needs to survive: a block that was lost with
its harvester or its node goes back to *wanted*, and a buffer that was started again harvests what
its readers ask for next.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

import ray

from saeray.actors.waiting import POLL_SECONDS, NotYet
from saeray.errors import SaerayError
from saeray.spec.messages import CacheKey, Gauges, RowsWanted, is_packs
from saeray.spec.order import StreamOrder
from saeray.stream.buffer_gauges import keep_telling
from saeray.stream.harvester_pool import HarvesterPool
from saeray.stream.policy import LAG_SECONDS, Policy, ReaderState
from saeray.stream.row_requests import RowRequests
from saeray.stream.users import Users

FREE_SECONDS = 3.0  # what Ray may take to free a block's memory once nobody refers to it
SLOWER_READERS = "slower readers"


class WindowBlocks(NamedTuple):
    """What a reader gets: the references of a window's blocks that it lacks, in the stream's order.

    They travel inside lists, so Ray does not fetch them on the way.
    """

    blocks: range  # all of the window
    refs: list[Any]  # of the last ones of them


class ActivationBuffer:
    """The actor: carries out what `Policy` decides."""

    def __init__(
        self,
        order: StreamOrder,
        slots: int,
        hook_points: list[str],
        token_server: Any,
        harvesters: list[Any],
        *,
        lag_s: float = LAG_SECONDS,
        lag_at_a_time: bool = False,
        room: int | None = None,
        cache: CacheKey | None = None,
        about: Any = None,
        absent: Sequence[int] = (),
        shared: bool = False,
    ) -> None:
        """token_server, harvesters: actors; they outlive this one. about: see `describe`.

        absent: harvesters that wait for a node; they join in when they get it.
        shared: by several sweeps. It ends with its actors when the last one has left.

        room: blocks the object store can hold, those included that are released and not yet freed;
        at least `slots`. None: there is no need to look.
        """
        self.policy = Policy(order, slots, lag_at_a_time)
        self.order = order
        self.hook_points = hook_points
        self.token_server = token_server
        self.harvesters = harvesters
        self.lag_s = lag_s
        self.room = room
        self.released: deque[float] = deque()  # when each of the latest blocks was
        self.about = about
        self.incarnation = uuid.uuid4().hex
        self.blocks: dict[int, list[Any]] = {}  # one reference per hook point
        self.awaited: dict[int, asyncio.Event] = {}  # by window: set once it is ready
        self.statistics: dict[tuple[Any, ...], asyncio.Future[Any]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.will_look_again = False
        self.detached: list[str] = []
        self.dismissed: set[str] = set()
        self.warnings: list[str] = []
        self.users = Users(give_up=self.let_go, close=self.close) if shared else None
        self.pool = HarvesterPool(
            token_server,
            harvesters,
            len(hook_points),
            cache,
            absent,
            do=self.do,
            warn=self.warn,
            up_again=self.pump,
        )
        self.row_requests = RowRequests(self.pool)
        if self.users is not None:
            self.do(self.users.watch())
        if about is not None:
            self.do(keep_telling(self.gauges, about.name))
            self.do(self.pool.watch_nodes())

    # --- what readers and the roster call ---------------------------------------------------

    async def describe(self) -> Any:
        """What it was told about itself: for a roster that has lost its memory."""
        return self.about

    async def expect(self, reader: str, window: int, user: str = "") -> None:
        """Announces a reader that will start at `window`: its blocks are kept from now on.

        One of another sweep that comes late is served on its own, so that those that are far
        ahead need not wait for it.
        """
        if reader not in self.policy.readers:
            self.policy.welcome(reader, window)
        if self.users is not None:
            self.users.reads(user, reader)
        self.pump()

    async def join(self, user: str) -> bool:
        """A sweep uses this stream, or still does; False when it is just being closed."""
        return self.users is None or self.users.join(user)

    async def part(self, user: str) -> None:
        """A sweep has done with this stream; the last one to go closes it."""
        if self.users is not None:
            self.users.part(user)

    async def window(
        self, reader: str, window: int, lost: Iterable[str] = (), have: int = 0
    ) -> WindowBlocks | NotYet:
        """The blocks of a window; all before it the reader has done with, and they are released.

        `lost`: references (in hex) that could not be fetched; their blocks are harvested again.
        `have`: blocks at the window's beginning that the reader kept from the one before.
        References are what a buffer with many readers spends its time on, and this halves them.
        Answers `NotYet` after `POLL_SECONDS` when the window is not ready: ask again.

        Raises:
            SaerayError: the stream can't go on, or the reader was dismissed; says why.
        """
        if reader in self.dismissed:
            raise SaerayError(f"{reader} was given up")
        self.forget(set(lost))
        self.policy.ask(reader, window, time.monotonic())
        blocks = self.order.blocks_of(window)
        state = self.policy.readers[reader]
        if not await self.until_ready(window, state if have else None):
            # For one that is served alone a half window may be given up: it shall not keep any.
            return self.not_yet(blocks, let_go=state.detached)
        state.asks_since = None
        return WindowBlocks(blocks, [self.blocks[b] for b in blocks[have:]])

    async def rows_for_dead(self, wanted: RowsWanted, snapshots: list[Any]) -> list[Any] | NotYet:
        """See `RowRequests.of`."""
        return await self.row_requests.of(wanted, snapshots)

    async def leave(self, reader: str) -> None:
        """A reader that is done, or gone: nothing is kept for it any more."""
        self.policy.readers.pop(reader, None)
        self.row_requests.forget(reader)
        self.pump()

    async def dismiss(self, reader: str) -> None:
        """A reader is gone for good: what may be left of its process shall hold nothing either."""
        self.dismissed.add(reader)
        await self.leave(reader)

    async def keep_only(self, readers: Iterable[str], user: str) -> None:
        """Of a sweep whose roster was started again: its packs are these, all others are gone.

        Nobody else would dismiss those: who knew of them died with them.
        """
        known = {*self.policy.readers} if self.users is None else self.users.readers_of(user)
        for reader in {r for r in known if is_packs(r)} - {*readers}:
            await self.dismiss(reader)

    async def statistic(self, hook_point: str, name: str, n_rows: int, seed: int) -> Any | NotYet:
        """`statistic_of` the first half buffer, computed once; or `NotYet`: ask again."""
        key = (hook_point, name, n_rows, seed)
        if key not in self.statistics:
            reader_name = f"{name} at {hook_point}"
            reader = self.policy.ask(reader_name, 0, time.monotonic())
            reader.detached = all(r.window > 1 for r in self.policy.readers.values() if r != reader)
            if not await self.until_ready(0):
                return self.not_yet(self.order.blocks_of(0))
            if key not in self.statistics:  # no other call came first while this one waited
                at = self.hook_points.index(hook_point)
                refs = [self.blocks[b][at] for b in self.order.blocks_of(0)]
                self.statistics[key] = asyncio.ensure_future(self.sampled(name, n_rows, seed, refs))
                self.policy.readers.pop(reader_name, None)
        done, _ = await asyncio.wait([self.statistics[key]], timeout=POLL_SECONDS)
        if not done:
            return NotYet(f"harvester 0 ({name} of a sample of activations)")
        if self.statistics[key].exception() is not None:
            # A block was lost, or the harvester; the next call starts anew.
            failed = self.statistics.pop(key).exception()
            self.warn(f"{name} of {hook_point}: {failed}; computed again.")
            return NotYet(f"harvester 0 ({name} of a sample of activations)")
        return self.statistics[key].result()

    async def sampled(self, name: str, n_rows: int, seed: int, refs: list[Any]) -> Any:
        return await self.harvesters[0].statistic.remote(name, n_rows, seed, *refs)

    def let_go(self, readers: Iterable[str]) -> None:
        """What these needed is needed no more."""
        for reader in readers:
            self.policy.readers.pop(reader, None)
        self.pump()

    def close(self) -> None:
        """Ends the stream's actors, this one last."""
        for a in (*self.harvesters, self.token_server, ray.get_runtime_context().current_actor):
            ray.kill(a)

    async def gauges(self) -> Gauges:
        return Gauges(
            incarnation=self.incarnation,
            harvested_tokens=self.pool.harvested_tokens,
            cached_tokens=self.pool.cached_tokens,
            resampling_tokens=self.pool.resampling_tokens,
            slots=self.policy.slots,
            used=len(self.policy.held),
            ready=len(self.policy.ready),
            harvest_seconds=self.pool.seconds,
            elapsed_seconds=self.pool.elapsed_seconds,
            n_harvesters=len(self.harvesters),
            n_down=len(self.pool.down),
            readers={name: r.window for name, r in self.policy.readers.items()},
            detached=list(self.detached),
            warnings=list(self.warnings),
        )

    # --- acting -----------------------------------------------------------------------------

    def pump(self) -> None:
        """Releases what no reader needs and submits harvests while slots and harvesters last."""
        kept = self.policy.kept()
        for block in self.policy.ready - kept:
            self.release(block)  # the last reference here; Ray frees the memory
        detached = self.policy.watch_lag(time.monotonic(), self.lag_s)
        if detached:
            self.detached += detached
            self.wake(list(self.awaited))
        while (at := self.pool.free()) is not None:
            wanted = self.policy.next_block()
            if wanted is None or not self.has_room():
                return
            self.policy.held.add(wanted)
            self.pool.taken(at)
            self.do(self.harvest(wanted, at))

    def has_room(self) -> bool:
        """Whether one more block would fit beside those whose memory Ray has yet to free.

        A store that is over full spills to disk, which stalls everyone on the node.
        """
        if self.room is None:
            return True
        now = time.monotonic()
        while self.released and now - self.released[0] > FREE_SECONDS:
            self.released.popleft()
        if len(self.policy.held) + len(self.released) < self.room:
            return True
        if not self.will_look_again:
            self.will_look_again = True
            asyncio.get_running_loop().call_later(
                self.released[0] + FREE_SECONDS - now + 0.05, self.look_again
            )
        return False

    def look_again(self) -> None:
        self.will_look_again = False
        self.pump()

    def do(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def release(self, block: int) -> None:
        if self.room is not None:
            self.released.append(time.monotonic())
        self.policy.ready.discard(block)
        self.policy.held.discard(block)
        self.blocks.pop(block, None)

    def forget(self, lost: set[str]) -> None:
        """Blocks that are gone with their node are wanted again."""
        if not lost:
            return
        for block, refs in list(self.blocks.items()):
            if block in self.policy.ready and any(r.hex() in lost for r in refs):
                self.warn("blocks were lost with their node; they are harvested again.")
                self.release(block)
        for key, future in list(self.statistics.items()):
            if not future.done():
                del self.statistics[key]

    async def harvest(self, block: int, at: int) -> None:
        """One block at one harvester; when that fails the block is wanted again."""
        refs = await self.pool.harvest(block, at)
        if refs is None:
            self.policy.held.discard(block)
        else:
            self.blocks[block] = refs
            self.policy.ready.add(block)
        self.tell(block)
        self.pump()

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def not_yet(self, blocks: range, let_go: bool = False) -> NotYet:
        """The answer to who asks for a window that is not ready."""
        late = self.late(blocks)
        # A source of text that is slow is waited for as long as something comes from it, and a
        # slow reader until the policy detaches it.
        progress = self.pool.text_progress if late.startswith("the token server") else 0
        if late.startswith(SLOWER_READERS) and self.policy.stragglers():
            progress = int(time.monotonic())
        return NotYet(late, let_go, progress)

    def late(self, blocks: range) -> str:
        """Who keeps a window from being ready, in words."""
        now = time.monotonic()
        missing = [b for b in blocks if b not in self.policy.ready]
        for block in missing:
            if block in self.pool.under_way:
                who, since = self.pool.under_way[block]
                return f"{who} (block {block}, for {now - since:.0f} s)"
        if self.pool.all_down:
            return "the harvesters (all of them are being started again)"
        slowest = sorted(self.policy.readers.items(), key=lambda item: item[1].window)[:3]
        return f"{SLOWER_READERS}, which hold the buffer: " + ", ".join(
            f"{name} at window {r.window}" for name, r in slowest
        )

    def tell(self, block: int) -> None:
        """Wakes those who wait for a window that is now ready; all of them after an error."""
        group = block // self.order.group_blocks
        if self.pool.error is not None:
            self.wake(list(self.awaited))
        else:
            self.wake([window for window in (group, group + 1) if self.policy.is_ready(window)])

    def wake(self, windows: Iterable[int]) -> None:
        for window in windows:
            if window in self.awaited:
                self.awaited.pop(window).set()

    async def until_ready(self, window: int, attached: ReaderState | None = None) -> bool:
        """Waits for a window's blocks, `POLL_SECONDS` at most; whether they are all there.

        attached: no longer than this reader is.
        """
        deadline = time.monotonic() + POLL_SECONDS
        self.pump()
        while True:
            if self.pool.error is not None:
                raise type(self.pool.error)(*self.pool.error.args)
            if self.policy.is_ready(window):
                return True
            left = deadline - time.monotonic()
            if left <= 0 or (attached is not None and attached.detached):
                return False
            event = self.awaited.setdefault(window, asyncio.Event())
            try:
                await asyncio.wait_for(event.wait(), left)
            except (TimeoutError, asyncio.TimeoutError):
                return False
