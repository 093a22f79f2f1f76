"""From SAEs to running packs: cut, queued, launched and followed.

Packs wait in a queue until the cluster has room for them. Each is followed to its end, so that none
of its SAEs is left without one. A pack that fails further on than it began is queued again, one
whose processes were killed also before that, `LAUNCHES` times; and so is one for whose SAEs memory
turns out to have no room, once the model is there. SAEs whose stream has no room beside this
sweep's other streams (`streams`) wait until those are through.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import ray
from ray.exceptions import RayError

from saeray.actors.groups import end_orphaned_groups
from saeray.actors.nodes import cluster_now, namespace
from saeray.actors.waiting import POLL_SECONDS, NotYet, steadily
from saeray.cluster.launcher import AboutPack, Ended, found_again, start_launcher
from saeray.cluster.reports import Reports
from saeray.cluster.streams import Streams
from saeray.cluster.sweep_state import Entry, PackState, SweepState
from saeray.errors import Late
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fitted import Fitted
from saeray.spec.grid import SAE
from saeray.spec.messages import INTERRUPTED, NOTHING, TRAINING, WAITING, PackPlan, pack_name
from saeray.spec.plan import by_stream, cut_packs
from saeray.spec.room import shown
from saeray.stream.launch import Stream

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0  # for packs to save what they have and end
LAUNCHES = 4  # of a pack whose processes are killed each time before anything new is saved
TAKE_OVER_SECONDS = 30.0  # that a buffer may be away when a roster was started again
IDLE_SECONDS = 10.0  # that SAEs may wait though nothing runs, before they are launched
ORPHAN_SECONDS = 20.0  # that what a killed pack has held may take to be without an owner


class Queued(NamedTuple):
    """A pack that waits for room."""

    stream: str
    saes: list[SAE]
    fitted: Fitted
    tries: int = 0  # that came to nothing: see `AboutPack`


class Dispatch:
    """The packs of one sweep."""

    def __init__(self, state: SweepState, reports: Reports, streams: Streams) -> None:
        self.state = state
        self.reports = reports
        self.streams = streams
        self.queue: deque[Queued] = deque()  # packs that wait for room
        self.put_off: set[str] = set()  # SAEs that wait until other streams are through
        self.launching = asyncio.Lock()
        self.idle_since: float | None = None  # nothing runs though SAEs wait
        self.tidying: asyncio.Task[None] | None = None
        self.tidy_until = 0.0

    async def take_over(self) -> None:
        """What a roster that was started again finds running, by its names."""
        found, packs = await found_again(self.state.name)
        self.streams.take_over(found, [about for about, _ in packs])
        for about, launcher in packs:
            pack = PackState(about, launcher, announced=True, heard_of=True)
            self.state.packs[about.name] = pack
            for name in about.configs:
                if not self.state.entries[name].ended:
                    self.state.entries[name].state = TRAINING
            first = LanguageModelSAERunnerConfig.from_dict(next(iter(about.configs.values())))
            self.begin_following(pack, first)
        readers = [r for pack in self.state.packs.values() for r in pack.readers]
        for stream in found:
            # Before any other is launched. Where it can't be, they are detached in time.
            with suppress(RayError):
                keep_only = partial(stream.buffer.keep_only.remote, readers, self.state.name)
                await steadily(keep_only, TAKE_OVER_SECONDS)
        self.tidy()

    async def launch(self, entries: Sequence[Entry]) -> None:
        """Cuts packs, launches what has room, and starts the streams they read.

        Trainers take as long to come up as a language model, so both start at once; a trainer then
        asks for its plan, which is made when the stream is there.
        """
        async with self.launching:
            queued = {s.name for waits in self.queue for s in waits.saes}
            try:
                waiting = [e for e in entries if e.state == WAITING and e.name not in queued]
                streams = by_stream([SAE(e.name, e.config) for e in waiting])
                for key, saes in streams.items():
                    self.streams.unchecked[key] = [s.config for s in saes]
                for key, saes in streams.items():
                    placed = await self.streams.place(key, saes, self.fitted_packs)
                    if placed is None:
                        self.put_off.update(s.name for s in saes)
                        self.streams.placement += f"; {len(saes)} on another stream later"
                        continue
                    stream, fitted = placed
                    for members in cut_packs(saes, fitted.saes_per_trainer):
                        self.queue.append(Queued(stream, members, fitted))
                self.launch_next()
            except Exception as error:
                self.reports.give_up(error)

    async def start_idlers(self) -> None:
        """Launches SAEs that wait while nothing is on its way for which they could.

        Of use after a roster was lost between one step of a launch and the next.

        What waits so for its `wait_limit_s` is given up, with the sweep.
        """
        waiting = [e for e in self.state.entries.values() if e.state == WAITING and not e.withdrawn]
        at_work = self.queue or self.running or self.launching.locked()
        if not waiting or at_work or self.state.over or self.state.error is not None:
            self.idle_since = None
            return
        now, limit = time.monotonic(), waiting[0].config.wait_limit_s
        self.idle_since = self.idle_since or now
        if now - self.idle_since > limit:
            names = ", ".join(e.name for e in waiting[:3])
            self.reports.give_up(
                Late(
                    f"{len(waiting)} SAEs ({names} …) found no room for {limit:g} s (wait_limit_s) "
                    "though nothing runs; --resume goes on with them."
                )
            )
        elif now - self.idle_since > IDLE_SECONDS:
            await self.launch(waiting)

    async def launch_put_off(self) -> None:
        """Those that waited for other streams, once these are through."""
        names, self.put_off = self.put_off, set()
        await self.launch([self.state.entries[name] for name in sorted(names)])

    @property
    def running(self) -> list[PackState]:
        """Packs that were launched and are not through."""
        return [pack for pack in self.state.packs.values() if not pack.task.done()]

    def fitted_packs(self) -> list[Fitted]:
        """What each pack takes that trains or waits for its room."""
        packs = [pack.about.fitted for pack in self.running]
        return packs + [waits.fitted for waits in self.queue]

    def launch_next(self) -> None:
        """Launches waiting packs while the cluster has room for them."""
        if not self.queue or self.state.over or self.state.error is not None:
            return
        room = self.streams.room()  # looked up once: each look asks Ray for all its nodes
        for pack in self.running:
            room.place_all(pack.about.fitted.trainer, pack.about.fitted.num_workers)
        while self.queue:
            stream, saes, fitted, tries = self.queue[0]
            # One at least: Ray, and an autoscaler, shall see what is waited for.
            has_room = room.place_all(fitted.trainer, fitted.num_workers) is not None
            if fitted.most_packs and len(self.running) >= fitted.most_packs:
                has_room = False
            if not has_room and self.running:
                return
            self.queue.popleft()
            name = pack_name(len(self.state.packs) + 1, self.state.incarnation)
            configs = {s.name: s.config.to_dict() for s in saes}
            about = AboutPack(name, stream, configs, fitted, tries)
            pack = self.state.packs[name] = PackState(about)
            for s in saes:
                self.state.entries[s.name].state = TRAINING
            pack.launcher = start_launcher(
                f"{self.state.name}/{name}",
                about,
                ray.get_actor(self.state.name, namespace()),
                (self.state.folder / ".ray").uri,
                saes[0].config.wait_limit_s,
            )
            self.begin_following(pack, saes[0].config)

    def begin_following(self, pack: PackState, config: LanguageModelSAERunnerConfig) -> None:
        """However it ends, the pack's room is then free for the next one."""
        pack.task = self.state.do(self.follow(pack, config))
        pack.task.add_done_callback(lambda _: self.after_a_pack())

    def after_a_pack(self) -> None:
        self.launch_next()
        idle = not self.fitted_packs()
        if self.put_off and idle and not self.state.over and self.state.error is None:
            self.state.do(self.launch_put_off())

    async def follow(self, pack: PackState, config: LanguageModelSAERunnerConfig) -> None:
        """One pack from its launch to its end; no SAE of it is left without one."""
        try:
            await self.follow_through(pack, config)
        except Exception as error:
            logger.exception("following %s", pack.about.name)
            for name in pack.members:
                if not self.state.entries[name].ended:
                    self.reports.end(self.state.entries[name], INTERRUPTED, f"{name}: {error!r}")

    async def follow_through(self, pack: PackState, config: LanguageModelSAERunnerConfig) -> None:
        problem: str | None = None
        fitted = pack.about.fitted
        put_back, most = False, 0  # until there is memory for its SAEs
        try:
            pack.first_tokens = await asyncio.to_thread(self.saved_tokens, pack.members)
            stream = await self.streams.called(pack.about.stream)
            most = stream.about.most_packs
            beside = [p for p in self.running if p.admitted and p.about.stream == pack.about.stream]
            put_back = bool(most) and len(beside) >= most
            if put_back:
                pack.nothing_to_do = True
            else:
                pack.admitted = True
                # One that comes while others train holds their buffer once it is there: `plan`.
                if not any(other.reader for other in beside):
                    await self.expected(pack, stream)
                pack.stream = stream
        except Exception as error:
            problem = str(error)
            pack.nothing_to_do = True
        # In any case: a trainer whose launcher is not waited for leaves its placement group behind.
        waits = fitted.waits_for
        limit = max(config.wait_limit_s, config.resources.node_wait_s if waits else 0.0)
        ended = await self.end_of(pack, limit)
        for name in pack.members:
            entry = self.state.entries[name]
            if entry.settling is not None:
                await entry.settling
        if self.state.over:
            return
        left = [self.state.entries[n] for n in pack.members if not self.state.entries[n].ended]
        if put_back:
            saes = [SAE(e.name, e.config) for e in left]
            later = replace(fitted, most_packs=most)
            self.queue.append(Queued(pack.about.stream, saes, later))
            return
        pack.through = True
        problem = pack.problem or problem or ended.problem or "its trainer ended early"
        if pack.stream is not None:
            for reader in pack.readers:
                await steadily(partial(pack.stream.buffer.dismiss.remote, reader))
        if ended.killed:
            self.tidy()
        if left and pack.problem is None and self.state.error is None:
            saved = await asyncio.to_thread(self.saved_tokens, [e.name for e in left])
            # One that failed by itself no further on than it began would do so next time, too.
            tries = 0 if saved > pack.first_tokens else pack.about.tries + 1
            if tries == 0 or (ended.killed and tries < LAUNCHES):
                await self.state.warn(f"{pack.about.name}: {problem}; started again.")
                saes = [SAE(e.name, e.config) for e in left]
                self.queue.appendleft(Queued(pack.about.stream, saes, fitted, tries))
                left = []
            elif ended.killed:
                problem = f"{problem}; so it was {tries} times before anything new was saved"
        for entry in left:
            self.reports.end(entry, INTERRUPTED, f"{entry.name}: {problem}")

    async def expected(self, pack: PackState, stream: Stream) -> None:
        """Has the stream's buffer keep what the pack will begin with."""
        pack.announced = True
        window = stream.about.plan.order.window_of(pack.first_tokens)
        for reader in pack.readers:
            await steadily(partial(stream.buffer.expect.remote, reader, window, self.state.name))

    def saved_tokens(self, names: Sequence[str]) -> int:
        """The least of these SAEs' newest checkpoints, in tokens; 0 where one has none."""
        saved = []
        for name in names:
            folder = self.state.folder / "trials" / name / "checkpoints"
            saved.append(max((int(n) for n in folder.names() if n.isdigit()), default=0))
        return min(saved, default=0)

    async def end_of(self, pack: PackState, limit: float) -> Ended:
        """Waits for the pack's trainer, and says how it ended."""
        deadline = time.monotonic() + limit
        while True:
            try:
                outcome = await steadily(pack.launcher.outcome.remote)
            except RayError as error:
                return Ended(f"its launcher died ({type(error).__name__})", killed=True)
            if not isinstance(outcome, NotYet):
                ray.kill(pack.launcher)
                if outcome.problem is None or outcome.killed:
                    return outcome
                return Ended(f"its trainer failed: {outcome.problem}")
            if not pack.heard_of and time.monotonic() > deadline:
                ray.kill(pack.launcher)
                fitted = pack.about.fitted
                return Ended(
                    f"its trainer did not start within {limit:g} s (wait_limit_s, or "
                    f"resources.node_wait_s): it needs {fitted.num_workers} x ({fitted.trainer}), "
                    f"and the cluster has {cluster_now()}, of which "
                    f"{shown(ray.available_resources())} is free."
                )

    async def plan(self, pack: str) -> PackPlan | NotYet:
        """What a pack's workers shall do: those of its SAEs that have not ended.

        Where there is nothing to do any more the plan is `NOTHING`: a trainer that simply returns
        gives back its placement group, one that fails would be started again first.
        """
        state = self.state.packs.get(pack)
        if state is None or state.through:
            return NOTHING
        state.heard_of = True
        self.state.reached("trainer")
        deadline = time.monotonic() + POLL_SECONDS
        while state.stream is None and time.monotonic() < deadline:
            if self.state.over or self.state.error is not None or state.nothing_to_do:
                return NOTHING
            await asyncio.sleep(0.05)
        if state.stream is None:
            return NotYet("the harvesters and the token server (loading the model and the text)")
        stream, about = state.stream.about, state.about
        configs = {n: c for n, c in about.configs.items() if not self.state.entries[n].ended}
        if not configs:
            return NOTHING
        if not state.announced:
            await self.expected(state, state.stream)
        return PackPlan(
            pack=pack,
            configs=configs,
            folder=self.state.folder.uri,
            hook_points=stream.hook_points,
            widths=stream.widths,
            order=stream.plan.order,
            buffer=state.stream.buffer,
            threads=about.fitted.threads,
            marker=self.state.marker,
            special=stream.special,
        )

    # --- what killed packs leave ------------------------------------------------------------

    def tidy(self) -> None:
        """Gives back, within seconds, what a pack has held whose processes were killed."""
        self.tidy_until = time.monotonic() + ORPHAN_SECONDS
        if self.tidying is None or self.tidying.done():
            self.tidying = self.state.do(self.end_orphans())

    async def end_orphans(self) -> None:
        """Ends placement groups as their owners' death becomes known."""
        while time.monotonic() < self.tidy_until:
            try:
                await asyncio.to_thread(end_orphaned_groups)
            except Exception as error:
                self.state.say(f"placement groups of killed trainers: {error!r}")
                return
            await asyncio.sleep(0.5)

    # --- the end ----------------------------------------------------------------------------

    async def stop_packs(self, wait: bool = True) -> None:
        """Tells packs that still train to stop, which makes them save what they have.

        A worker group that is killed instead would leave its placement group behind.
        """
        for entry in self.state.entries.values():
            entry.withdrawn = not entry.ended
        following = [pack.task for pack in self.running]
        if following and wait:
            await asyncio.wait(following, timeout=CLOSE_SECONDS)
        self.reports.interrupt_rest("the sweep was ended before it was trained")
        await self.reports.rows_written()
