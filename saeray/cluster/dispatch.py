"""From SAEs to running packs and the streams they read: what is placed, launched and followed.

Packs wait in a queue until the cluster has room for them. Each is followed to its end, so that none
of its SAEs is left without one; a pack that fails further on than it began is queued again.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from saeray.cluster.launch import (
    AboutPack,
    NameTaken,
    Stream,
    as_future,
    found_again,
    join_stream,
    running_stream,
    start_launcher,
    start_stream,
)
from saeray.cluster.nodes import cluster_now, held_by_others, namespace
from saeray.cluster.settling import Settling
from saeray.cluster.sweep_state import Entry, PackState, SweepState
from saeray.cluster.waiting import POLL_SECONDS, NotYet
from saeray.config import LanguageModelSAERunnerConfig, digest, stream_key
from saeray.errors import ConfigError, Late, SaerayError
from saeray.grid import SAE
from saeray.messages import INTERRUPTED, NOTHING, TRAINING, PackPlan
from saeray.placement import Cluster, Fitted, Need, fit, shown, wants_gpu
from saeray.plan import cut_packs

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0  # for packs to save what they have and end
SETTLE_SECONDS = 3.0  # for what an earlier sweep held to be given back, before it counts as taken


class Dispatch:
    """The streams and packs of one sweep."""

    def __init__(self, state: SweepState, settling: Settling) -> None:
        self.state = state
        self.settling = settling
        self.streams: list[Stream] = []
        self.starting: dict[str, asyncio.Task[Stream]] = {}  # by the stream's name
        self.queue: deque[tuple[str, list[SAE], Fitted]] = deque()  # packs that wait for room
        self.placement = ""  # what was chosen, and why
        # The need of our own harvesters and the nodes they are on, by stream.
        self.own: dict[str, tuple[Need, Sequence[str]]] = {}
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
            first = LanguageModelSAERunnerConfig.from_dict(next(iter(about.configs.values())))
            self.begin_following(pack, first)

    async def launch(self, entries: Sequence[Entry]) -> None:
        """Cuts packs, launches what has room, and starts the streams they read.

        Trainers take as long to come up as a language model, so both start at once; a trainer then
        asks for its plan, which is made when the stream is there.
        """
        queued = {s.name for _, saes, _ in self.queue for s in saes}
        try:
            by_stream: dict[str, list[SAE]] = {}
            for e in entries:
                if e.name not in queued:
                    by_stream.setdefault(stream_key(e.config), []).append(SAE(e.name, e.config))
            for key, saes in by_stream.items():
                stream, fitted = await self.place(key, saes)
                for members in cut_packs(saes, fitted.saes_per_trainer):
                    self.queue.append((stream, members, fitted))
            self.launch_next()
        except Exception as error:
            self.give_up(error)

    async def place(self, key: str, saes: list[SAE]) -> tuple[str, Fitted]:
        """The stream that serves these SAEs, running or to be started, and where all of it fits."""
        config = saes[0].config
        hooks = sorted({s.config.resolved_hook_point for s in saes})
        running = await self.stream_for(key, hooks, config)
        if self.taken is None:
            self.taken = await settled_holdings()
        fitted = self.fitted(config, len(saes), harvest=running is None)
        self.placement = str(fitted)
        if running is not None:
            self.state.do(self.write_sweep_yaml(fitted))
            return running, fitted
        if config.share_stream:
            name = shared_name(key, hooks)
        else:
            name = f"{self.state.name}/stream-{uuid.uuid4().hex[:6]}"
        self.own[name] = fitted.harvester, fitted.harvester_nodes
        self.starting[name] = self.state.do(self.start(name, key, [s.config for s in saes], fitted))
        return name, fitted

    def fitted(self, config: LanguageModelSAERunnerConfig, n_saes: int, harvest: bool) -> Fitted:
        """`fit` beside what others hold of the cluster; where there is no room, in their place."""
        everything = cluster_now(None if harvest else self.held_by_harvesters())
        use_gpu = wants_gpu(config, everything)
        if self.taken:
            free = Cluster(self.cluster(harvest).nodes)
            try:
                return fit(config.resources, free, n_saes, use_gpu, harvest)
            except ConfigError:
                pass  # other work has the room now
        fitted = fit(config.resources, everything, n_saes, use_gpu, harvest)
        if self.taken and not fitted.waits_for:
            fitted = replace(fitted, waits_for="room that other work on the cluster holds")
        return fitted

    def cluster(self, harvest: bool) -> Cluster:
        """The cluster without what others hold of it.

        Nor, without `harvest`, what this sweep's harvesters do: where nobody else plans for them.
        """
        held: dict[str, Counter[str]] = {}
        if self.taken:
            now = held_by_others()  # with what this sweep holds itself by now
            for node, of_node in self.taken.items():
                still = {k: min(v, now.get(node, {}).get(k, 0.0)) for k, v in of_node.items()}
                held[node] = Counter(still)
        if not harvest:
            for node, ours in self.held_by_harvesters().items():
                held[node] = held.get(node, Counter()) + ours
        return cluster_now(held)

    def held_by_harvesters(self) -> dict[str, Counter[str]]:
        """What the harvesters of this sweep's own streams hold of each node."""
        held: dict[str, Counter[str]] = {}
        for need, nodes in self.own.values():
            for node in nodes:
                held[node] = held.get(node, Counter()) + Counter(need.resources)
        return held

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
        self.own[name] = fitted.harvester, stream.nodes or fitted.harvester_nodes
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
        # Looked up once: each look asks Ray for all its nodes.
        free = {h: self.cluster(harvest=h) for h in {f.harvesters > 0 for _, _, f in self.queue}}
        while self.queue and not self.state.over and self.state.error is None:
            stream, saes, fitted = self.queue[0]
            running = sum(not p.task.done() for p in self.state.packs.values())
            if running >= fitted.packs_at_once(free[fitted.harvesters > 0]):
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
        pack.task.add_done_callback(lambda _: self.launch_next())

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
        following = [pack.task for pack in self.state.packs.values() if not pack.task.done()]
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
