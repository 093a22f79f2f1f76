"""From SAEs to running packs and the streams they read: what is placed, launched and followed.

Packs wait in a queue until the cluster has room for them. Each is followed to its end, so that none
of its SAEs is left without one; a pack that fails further on than it began is queued again. SAEs
whose stream has no room beside this sweep's other streams wait until those are through.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorUnavailableError, RayError

from saeray.actors.make import as_future
from saeray.actors.nodes import cluster_now, held_by_others, namespace
from saeray.actors.waiting import POLL_SECONDS, NotYet
from saeray.cluster.launcher import AboutPack, found_again, start_launcher
from saeray.cluster.reports import Settling
from saeray.cluster.sweep_state import Entry, PackState, SweepState
from saeray.errors import ConfigError, Late, SaerayError
from saeray.spec.config import LanguageModelSAERunnerConfig, digest
from saeray.spec.grid import SAE
from saeray.spec.messages import INTERRUPTED, NOTHING, TRAINING, WAITING, Gauges, PackPlan
from saeray.spec.placement import Fitted, fit, wants_gpu
from saeray.spec.plan import cut_packs
from saeray.spec.room import Cluster, Room, shown
from saeray.stream.launch import (
    SETTLE_SECONDS,
    NameTaken,
    Stream,
    join_stream,
    running_stream,
    start_stream,
)

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0  # for packs to save what they have and end


class Own(NamedTuple):
    """The harvesters of a stream that this sweep has started."""

    fitted: Fitted
    nodes: Sequence[str]  # of those that have one, as far as it is known


class Dispatch:
    """The streams and packs of one sweep."""

    def __init__(self, state: SweepState, settling: Settling) -> None:
        self.state = state
        self.settling = settling
        self.streams: list[Stream] = []
        self.starting: dict[str, asyncio.Task[Stream]] = {}  # by the stream's name
        self.queue: deque[tuple[str, list[SAE], Fitted]] = deque()  # packs that wait for room
        self.put_off: set[str] = set()  # SAEs that wait until other streams are through
        self.launching = asyncio.Lock()
        self.placement = ""  # what was chosen, and why
        self.own: dict[str, Own] = {}  # by stream
        # What others held of each node when this sweep began: not there to be planned with.
        self.taken: dict[str, dict[str, float]] | None = None

    async def take_over(self) -> None:
        """What a roster that was started again finds running, by its names."""
        self.streams, packs = await found_again(self.state.name)
        for about, launcher in packs:
            pack = self.state.packs[about.name] = PackState(about, launcher, heard_of=True)
            if any(s.about.name == about.stream for s in self.streams):
                for name in about.configs:
                    if not self.state.entries[name].ended:
                        self.state.entries[name].state = TRAINING
            else:
                self.starting[about.stream] = self.state.do(nowhere(about.stream))
            if about.fitted.harvesters:
                self.own[about.stream] = Own(about.fitted, about.fitted.harvester_nodes)
            first = LanguageModelSAERunnerConfig.from_dict(next(iter(about.configs.values())))
            self.begin_following(pack, first)

    async def launch(self, entries: Sequence[Entry]) -> None:
        """Cuts packs, launches what has room, and starts the streams they read.

        Trainers take as long to come up as a language model, so both start at once; a trainer then
        asks for its plan, which is made when the stream is there.
        """
        async with self.launching:
            queued = {s.name for _, saes, _ in self.queue for s in saes}
            try:
                by_stream: dict[str, list[SAE]] = {}
                for e in entries:
                    if e.state == WAITING and e.name not in queued:
                        by_stream.setdefault(e.stream_key, []).append(SAE(e.name, e.config))
                for key, saes in by_stream.items():
                    placed = await self.place(key, saes)
                    if placed is None:
                        self.put_off.update(s.name for s in saes)
                        self.placement += f"; {len(saes)} on another stream later"
                        continue
                    stream, fitted = placed
                    for members in cut_packs(saes, fitted.saes_per_trainer):
                        self.queue.append((stream, members, fitted))
                self.launch_next()
            except Exception as error:
                self.give_up(error)

    async def launch_put_off(self) -> None:
        """Those that waited for other streams, once these are through."""
        names, self.put_off = self.put_off, set()
        await self.launch([self.state.entries[name] for name in sorted(names)])

    async def place(self, key: str, saes: list[SAE]) -> tuple[str, Fitted] | None:
        """The stream that serves these SAEs, running or to be started, and where all of it fits.

        None: it fits, but not now, beside the other streams of this sweep.
        """
        config = saes[0].config
        hooks = sorted({s.config.resolved_hook_point for s in saes})
        running = await self.stream_for(key, hooks, config)
        if self.taken is None:
            self.taken = await settled_holdings()
        fitted = None
        if running is None and self.own:
            fitted = self.fitted_beside(config, len(saes))
            if fitted is None:
                if self.busy:
                    return None
                await self.end_own_streams()
        if fitted is None:
            fitted = self.fitted(config, len(saes), harvest=running is None)
        self.placement = str(fitted)
        if running is not None:
            first = self.own[running].fitted if running in self.own else fitted
            self.state.do(self.write_sweep_yaml(first))
            return running, fitted
        if config.share_stream:
            name = shared_name(key, hooks)
        else:
            name = f"{self.state.name}/stream-{uuid.uuid4().hex[:6]}"
        self.own[name] = Own(fitted, fitted.harvester_nodes)
        self.starting[name] = self.state.do(self.start(name, key, [s.config for s in saes], fitted))
        return name, fitted

    @property
    def running(self) -> list[PackState]:
        """Packs that were launched and are not through."""
        return [pack for pack in self.state.packs.values() if not pack.task.done()]

    @property
    def busy(self) -> bool:
        """Whether any pack trains, or waits for its room."""
        return bool(self.queue or self.running)

    def fitted(self, config: LanguageModelSAERunnerConfig, n_saes: int, harvest: bool) -> Fitted:
        """`fit` beside what others hold of the cluster; where there is no room, in their place."""
        use_gpu = wants_gpu(config, cluster_now())
        if self.taken:
            free = Cluster(self.room().left().nodes)
            try:
                return fit(config.resources, free, n_saes, use_gpu, harvest)
            except ConfigError:
                pass  # other work has the room now
        everything = self.room(others=False).left()
        fitted = fit(config.resources, everything, n_saes, use_gpu, harvest)
        if self.taken and not fitted.waits_for:
            fitted = replace(fitted, waits_for="room that other work on the cluster holds")
        return fitted

    def fitted_beside(self, config: LanguageModelSAERunnerConfig, n_saes: int) -> Fitted | None:
        """Where one more stream fits beside the others of this sweep and all their packs.

        None where it would get less than alone: one after the other then takes no longer, needs no
        more nodes, and each buffer has the object store to itself.

        Raises:
            ConfigError: it would not fit alone either.
        """
        everything = cluster_now()
        use_gpu = wants_gpu(config, everything)
        alone = fit(config.resources, everything, n_saes, use_gpu)
        room = self.room()
        packs = [pack.about.fitted for pack in self.running]
        for fitted in (*packs, *(fitted for _, _, fitted in self.queue)):
            if room.place_all(fitted.trainer, fitted.num_workers) is None:
                return None
        try:
            beside = fit(config.resources, Cluster(room.left().nodes), n_saes, use_gpu)
        except ConfigError:
            return None
        same = (beside.harvester, beside.trainer) == (alone.harvester, alone.trainer)
        return beside if same else None

    def room(self, others: bool = True) -> Room:
        """The cluster without what others (unless not `others`) and our own harvesters hold."""
        held: dict[str, dict[str, float]] = {}
        if others and self.taken:
            now = held_by_others()  # with what this sweep holds itself by now
            for node, of_node in self.taken.items():
                held[node] = {k: min(v, now.get(node, {}).get(k, 0.0)) for k, v in of_node.items()}
        cluster = cluster_now(held)
        room = Room((*cluster.nodes, *cluster.planned))
        for own in self.own.values():
            for node in own.nodes:
                room.take(node, own.fitted.harvester)
            room.place_all(own.fitted.harvester, own.fitted.harvesters - len(own.nodes))
        return room

    async def stream_for(
        self, key: str, hooks: list[str], config: LanguageModelSAERunnerConfig
    ) -> str | None:
        """The name of a stream that runs already and serves these hook points."""
        for stream in self.streams:
            if stream.about.key == key and set(hooks) <= set(stream.about.hook_points):
                return stream.about.name
        if config.share_stream:
            name = shared_name(key, hooks)
            shared = await running_stream(name)
            if shared is not None and await join_stream(shared, self.state.name):
                self.streams.append(shared)
                return name
        return None

    async def start(
        self, name: str, key: str, configs: list[LanguageModelSAERunnerConfig], fitted: Fitted
    ) -> Stream:
        self.state.phase = "loading the language model and the text"
        if fitted.waits_for:
            self.state.phase = f"waiting for {fitted.waits_for} (harvester: {fitted.harvester})"
        try:
            stream = await self.started(name, key, configs, fitted)
        except Exception as error:
            self.give_up(error)
            raise
        self.streams.append(stream)
        self.own[name] = Own(fitted, stream.nodes or fitted.harvester_nodes)
        await self.write_sweep_yaml(fitted)
        if self.state.training_since is None:
            self.state.phase = "starting trainers"
            if fitted.waits_for:
                self.state.phase += f" (waiting for {fitted.waits_for}; trainer: {fitted.trainer})"
        return stream

    async def started(
        self, name: str, key: str, configs: list[LanguageModelSAERunnerConfig], fitted: Fitted
    ) -> Stream:
        """A stream of its own, or the one that another sweep is starting at the same time."""
        if not configs[0].share_stream:
            return await start_stream(name, key, configs, fitted)
        limit = configs[0].wait_limit_s
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            stream = await running_stream(name)
            try:
                if stream is None:
                    stream = await start_stream(name, key, configs, fitted)
            except NameTaken:
                await asyncio.sleep(1.0)  # somebody else is at it
                continue
            if await join_stream(stream, self.state.name):
                return stream
            await asyncio.sleep(1.0)  # it is just being closed
        raise Late(
            f"the shared stream {name} was neither started by another sweep nor closed within "
            f"{limit:g} s (wait_limit_s); share_stream: false gives this sweep one of its own."
        )

    def launch_next(self) -> None:
        """Launches waiting packs while the cluster has room for them."""
        if not self.queue or self.state.over or self.state.error is not None:
            return
        room = self.room()  # looked up once: each look asks Ray for all its nodes
        for pack in self.running:
            room.place_all(pack.about.fitted.trainer, pack.about.fitted.num_workers)
        while self.queue:
            stream, saes, fitted = self.queue[0]
            # One at least: Ray, and an autoscaler, shall see what is waited for.
            if room.place_all(fitted.trainer, fitted.num_workers) is None and self.running:
                return
            self.queue.popleft()
            name = f"pack-{len(self.state.packs) + 1:03d}-{self.state.incarnation[:8]}"
            configs = {s.name: s.config.to_dict() for s in saes}
            about = AboutPack(name, stream, configs, fitted)
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
        if self.put_off and not self.busy and not self.state.over and self.state.error is None:
            self.state.do(self.launch_put_off())

    async def follow(self, pack: PackState, config: LanguageModelSAERunnerConfig) -> None:
        """One pack from its launch to its end; no SAE of it is left without one."""
        try:
            await self.follow_through(pack, config)
        except Exception as error:
            logger.exception("following %s", pack.about.name)
            for name in pack.members:
                if not self.state.entries[name].ended:
                    self.settling.end(self.state.entries[name], INTERRUPTED, f"{name}: {error!r}")

    async def follow_through(self, pack: PackState, config: LanguageModelSAERunnerConfig) -> None:
        problem: str | None = None
        try:
            pack.first_tokens = await asyncio.to_thread(self.saved_tokens, pack.members)
            stream = await self.stream_called(pack.about.stream)
            order = stream.about.plan.order
            first_window = order.window_of(pack.first_tokens)
            for reader in pack.readers:
                await steadily(
                    partial(stream.buffer.expect.remote, reader, first_window, self.state.name)
                )
            pack.stream = stream
        except Exception as error:
            problem = str(error)
            pack.nothing_to_do = True
        # In any case: a trainer whose launcher is not waited for leaves its placement group behind.
        waits = pack.about.fitted.waits_for
        limit = max(config.wait_limit_s, config.resources.node_wait_s if waits else 0.0)
        ended = await self.end_of(pack, limit)
        for name in pack.members:
            entry = self.state.entries[name]
            if entry.settling is not None:
                await entry.settling
        if self.state.over:
            return
        left = [self.state.entries[n] for n in pack.members if not self.state.entries[n].ended]
        problem = pack.problem or problem or ended or "its trainer ended early"
        if pack.stream is not None:
            for reader in pack.readers:
                await steadily(partial(pack.stream.buffer.leave.remote, reader))
        if left and pack.problem is None and self.state.error is None:
            saved = await asyncio.to_thread(self.saved_tokens, [e.name for e in left])
            # One that got no further than at its last start would not next time either.
            if saved > pack.first_tokens:
                await self.state.warn(f"{pack.about.name}: {problem}; started again.")
                saes = [SAE(e.name, e.config) for e in left]
                self.queue.appendleft((pack.about.stream, saes, pack.about.fitted))
                left = []
        for entry in left:
            self.settling.end(entry, INTERRUPTED, f"{entry.name}: {problem}")

    async def write_sweep_yaml(self, fitted: Fitted) -> None:
        configs = {e.name: e.config for e in self.state.entries.values()}
        await asyncio.to_thread(
            self.state.files.write_sweep_yaml, configs, self.state.provenance, fitted.as_data()
        )

    async def stream_called(self, name: str) -> Stream:
        for stream in self.streams:
            if stream.about.name == name:
                return stream
        return await asyncio.shield(self.starting[name])

    def saved_tokens(self, names: Sequence[str]) -> int:
        """The least of these SAEs' newest checkpoints, in tokens; 0 where one has none."""
        saved = []
        for name in names:
            folder = self.state.folder / "trials" / name / "checkpoints"
            saved.append(max((int(n) for n in folder.names() if n.isdigit()), default=0))
        return min(saved, default=0)

    async def end_of(self, pack: PackState, limit: float) -> str | None:
        """Waits for the pack's trainer; why it failed, if it did."""
        deadline = time.monotonic() + limit
        while True:
            try:
                outcome = await steadily(pack.launcher.outcome.remote)
            except RayError as error:
                return f"its launcher died ({type(error).__name__})"
            if not isinstance(outcome, NotYet):
                ray.kill(pack.launcher)
                return None if outcome[0] is None else f"its trainer failed: {outcome[0]}"
            if not pack.heard_of and time.monotonic() > deadline:
                ray.kill(pack.launcher)
                fitted = pack.about.fitted
                return (
                    f"its trainer did not start within {limit:g} s (wait_limit_s, or "
                    f"resources.node_wait_s): it needs {fitted.num_workers} x ({fitted.trainer}), "
                    f"and the cluster has {cluster_now()}, of which "
                    f"{shown(ray.available_resources())} is free."
                )

    def give_up(self, error: BaseException) -> None:
        """The whole sweep can't go on."""
        cause = getattr(error, "cause", None)
        self.state.error = cause if isinstance(cause, SaerayError) else error
        self.state.phase = "failed"
        self.settling.interrupt_rest(str(self.state.error))

    async def plan(self, pack: str) -> PackPlan | NotYet:
        """What a pack's workers shall do: those of its SAEs that have not ended.

        Where there is nothing to do any more the plan is `NOTHING`: a trainer that simply returns
        gives back its placement group, one that fails would be started again first.
        """
        state = self.state.packs.get(pack)
        if state is None:
            return NOTHING
        state.heard_of = True
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
        first = LanguageModelSAERunnerConfig.from_dict(next(iter(configs.values())))
        return PackPlan(
            pack=pack,
            configs=configs,
            folder=self.state.folder.uri,
            hook_index=stream.hook_points.index(first.resolved_hook_point),
            d_in=stream.widths[first.resolved_hook_point],
            order=stream.plan.order,
            buffer=state.stream.buffer,
            threads=about.fitted.threads,
            marker=self.state.marker,
        )

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
        self.settling.interrupt_rest("the sweep was ended before it was trained")
        await self.settling.rows_written()

    async def end_streams(self) -> None:
        """Ends what the sweep has started, and parts from what it shares."""
        for pack in self.state.packs.values():
            ray.kill(pack.launcher)
        for stream in self.streams:
            if stream.shared:
                await self.part_from(stream)
            else:
                for a in stream.actors():
                    ray.kill(a)
        self.streams.clear()
        self.own.clear()

    async def end_own_streams(self) -> None:
        """Streams that no pack reads any more make room for the next one."""
        await asyncio.gather(*self.starting.values(), return_exceptions=True)
        self.starting.clear()
        await self.write_caches()
        for stream in self.streams:
            await self.look(stream)
        await self.end_streams()

    async def look(self, stream: Stream) -> Gauges | None:
        """A stream's gauges, of which is kept what would be gone with its buffer.

        None where it is busy or being started again; the next look will tell.
        """
        try:
            gauges: Gauges = await asyncio.wait_for(stream.buffer.gauges.remote(), POLL_SECONDS)
        except (TimeoutError, asyncio.TimeoutError, RayError):
            return None
        new = gauges.incarnation not in self.state.tokens
        self.state.tokens[gauges.incarnation] = (gauges.harvested_tokens, gauges.cached_tokens)
        for text in gauges.warnings:
            await self.state.warn(text)
        if new and len(self.state.tokens) > 1:
            await self.state.remember()
        return gauges

    async def part_from(self, stream: Stream) -> None:
        try:
            await asyncio.wait_for(stream.buffer.part.remote(self.state.name), POLL_SECONDS)
        except (TimeoutError, asyncio.TimeoutError, RayError):
            pass  # it has ended itself, being the last, or forgets this sweep after a while

    async def write_caches(self) -> None:
        """Waits for blocks that are still on their way into the activation cache."""
        flushes = [
            h.flush.remote()
            for stream in self.streams
            if stream.config.activation_cache is not None
            for h in stream.harvesters
        ]
        if flushes:
            await asyncio.wait(
                [asyncio.ensure_future(as_future(f)) for f in flushes], timeout=CLOSE_SECONDS
            )

    async def renew(self) -> None:
        """Signs of life to streams that others share."""
        for stream in self.streams:
            if stream.shared:
                try:
                    await asyncio.wait_for(stream.buffer.join.remote(self.state.name), POLL_SECONDS)
                except (TimeoutError, asyncio.TimeoutError, RayError):
                    continue  # being started again; the next sign will reach it


def shared_name(key: str, hooks: Sequence[str]) -> str:
    """The name of a stream that sweeps share: those with the same one serve each other."""
    return f"stream:{digest([key, *hooks])}"


async def settled_holdings() -> dict[str, dict[str, float]]:
    """What other work holds of the nodes, once what has just ended has given its share back."""
    deadline = time.monotonic() + SETTLE_SECONDS
    held = held_by_others()
    while held and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
        held = held_by_others()
    return held


async def steadily(call: Callable[[], Any]) -> Any:
    """A call that is repeated while its actor is being started again."""
    while True:
        try:
            return await call()
        except ActorUnavailableError:
            await asyncio.sleep(0.2)


async def nowhere(stream: str) -> Stream:
    raise SaerayError(f"{stream} is not there any more")
