"""The streams that a sweep's packs read: where one fits, how it starts, what it holds, its end.

A stream is started where it fits beside this sweep's other streams and all their packs; SAEs whose
stream gets less there than alone wait (`dispatch`) until the others are through.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import ray
from ray.exceptions import RayError

from saeray.actors.make import as_future
from saeray.actors.nodes import cluster_now, held_by_others
from saeray.actors.waiting import POLL_SECONDS
from saeray.cluster.launcher import AboutPack
from saeray.cluster.reports import Reports
from saeray.cluster.sweep_state import SweepState
from saeray.errors import ConfigError, Late
from saeray.spec.config import LanguageModelSAERunnerConfig, digest
from saeray.spec.fitted import Fitted
from saeray.spec.grid import SAE
from saeray.spec.memory import fit_saes
from saeray.spec.messages import Gauges
from saeray.spec.placement import wants_gpu
from saeray.spec.plan import hook_points_of
from saeray.spec.room import Cluster, Room
from saeray.spec.stream import rows_said
from saeray.spec.synthetic import is_synthetic
from saeray.stream.launch import (
    SETTLE_SECONDS,
    NameTaken,
    Stream,
    join_stream,
    running_stream,
    start_stream,
)

FLUSH_SECONDS = 60.0  # for blocks that are on their way into the activation cache


class Own(NamedTuple):
    """The harvesters of a stream that this sweep has started."""

    fitted: Fitted
    nodes: Sequence[str]  # of those that have one, as far as it is known


class Streams:
    """The activation streams of one sweep."""

    def __init__(self, state: SweepState, reports: Reports) -> None:
        self.state = state
        self.reports = reports
        self.running: list[Stream] = []
        self.starting: dict[str, asyncio.Task[Stream]] = {}  # by the stream's name
        self.placement = ""  # what was chosen, and why
        self.own: dict[str, Own] = {}  # by stream
        # Configs by stream key that nobody has checked; the first stream to start sees to all.
        self.unchecked: dict[str, list[LanguageModelSAERunnerConfig]] = {}
        # What others held of each node when this sweep began: not there to be planned with.
        self.taken: dict[str, dict[str, float]] | None = None

    def take_over(self, found: list[Stream], packs: Sequence[AboutPack]) -> None:
        """What a roster that was started again finds running, and packs that read it."""
        self.running = found
        for about in packs:
            if about.fitted.harvesters:
                self.own[about.stream] = Own(about.fitted, about.fitted.harvester_nodes)

    def runs(self, name: str) -> bool:
        return any(s.about.name == name for s in self.running)

    async def place(
        self, key: str, saes: list[SAE], packs: Callable[[], list[Fitted]]
    ) -> tuple[str, Fitted] | None:
        """The stream that serves these SAEs, running or to be started, and where all of it fits.

        packs: what this sweep's packs take, running and waiting ones, at the time it is called.
        None: it fits, but not now, beside the other streams of this sweep.
        """
        configs = [s.config for s in saes]
        config, hooks = configs[0], hook_points_of(configs)
        running = await self.stream_for(key, hooks, config)
        if self.taken is None:
            self.taken = await settled_holdings()
        fitted = None
        if running is None and self.own:
            fitted = self.fitted_beside(configs, packs())
            if fitted is None:
                if packs():
                    return None
                await self.end_own()
        if fitted is None:
            fitted = self.fitted(configs, harvest=running is None)
        self.say_placement(fitted, config)
        if running is not None:
            first = self.own[running].fitted if running in self.own else fitted
            self.state.do(self.state.write_sweep_yaml(first))
            return running, fitted
        if config.share_stream:
            name = shared_name(key, hooks)
        else:
            name = f"{self.state.name}/stream-{uuid.uuid4().hex[:6]}"
        self.own[name] = Own(fitted, fitted.harvester_nodes)
        self.starting[name] = self.state.do(self.start(name, key, configs, fitted))
        return name, fitted

    def say_placement(self, fitted: Fitted, config: LanguageModelSAERunnerConfig) -> None:
        passes = fitted.passes_said(config.activation_cache is not None)
        said = [str(fitted), passes, rows_said(config)]
        self.placement = "; ".join(text for text in said if text)

    def fitted(self, configs: list[LanguageModelSAERunnerConfig], harvest: bool) -> Fitted:
        """`fit` beside what others hold of the cluster; where there is no room, in their place."""
        use_gpu = wants_gpu(configs[0], cluster_now())
        if self.taken:
            free = Cluster(self.room().left().nodes)
            try:
                return fit_saes(configs, free, use_gpu, harvest)
            except ConfigError:
                pass  # other work has the room now
        everything = self.room(others=False).left()
        fitted = fit_saes(configs, everything, use_gpu, harvest)
        if self.taken and not fitted.waits_for:
            fitted = replace(fitted, waits_for="room that other work on the cluster holds")
        return fitted

    def fitted_beside(
        self, configs: list[LanguageModelSAERunnerConfig], packs: list[Fitted]
    ) -> Fitted | None:
        """Where one more stream fits beside the others of this sweep and all their packs.

        None where it would get less than alone: one after the other then takes no longer, needs no
        more nodes, and each buffer has the object store to itself.

        Raises:
            ConfigError: it would not fit alone either.
        """
        everything = cluster_now()
        use_gpu = wants_gpu(configs[0], everything)
        alone = fit_saes(configs, everything, use_gpu)
        room = self.room()
        for fitted in packs:
            if room.place_all(fitted.trainer, fitted.num_workers) is None:
                return None
        try:
            beside = fit_saes(configs, Cluster(room.left().nodes), use_gpu)
        except ConfigError:
            return None
        same = (beside.harvester, beside.trainer) == (alone.harvester, alone.trainer)
        return beside if same and beside.passes <= alone.passes else None

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
        for stream in self.running:
            if stream.about.key == key and set(hooks) <= set(stream.about.hook_points):
                return stream.about.name
        if config.share_stream:
            name = shared_name(key, hooks)
            shared = await running_stream(name)
            if shared is not None and await join_stream(shared, self.state.name):
                self.running.append(shared)
                return name
        return None

    async def start(
        self, name: str, key: str, configs: list[LanguageModelSAERunnerConfig], fitted: Fitted
    ) -> Stream:
        self.state.phase = "loading the language model and the text"
        if is_synthetic(configs[0].model_name):
            self.state.phase = "making the dictionary of known features"
        if fitted.waits_for:
            self.state.phase = f"waiting for {fitted.waits_for} (harvester: {fitted.harvester})"
        try:
            stream = await self.started(name, key, configs, fitted)
        except Exception as error:
            self.reports.give_up(error)
            raise
        self.state.reached("language model and text")
        self.running.append(stream)
        if most := stream.about.most_packs:
            self.say_placement(replace(fitted, packs=most, most_packs=most), configs[0])
        if stream.memory:
            self.placement += f"; {stream.memory}"
        device = "cuda" if fitted.trainer_gpus else "cpu"
        formats = dict.fromkeys(c.computes_in(device) for c in configs)
        self.placement += f"; SAEs compute in {', '.join(formats)}"
        self.own[name] = Own(fitted, stream.nodes or fitted.harvester_nodes)
        for text in stream.warnings:
            await self.state.warn(text)
        await self.state.write_sweep_yaml(fitted)
        if self.state.training_since is None:
            self.state.phase = "starting trainers"
            if fitted.waits_for:
                self.state.phase += f" (waiting for {fitted.waits_for}; trainer: {fitted.trainer})"
        return stream

    async def started(
        self, name: str, key: str, configs: list[LanguageModelSAERunnerConfig], fitted: Fitted
    ) -> Stream:
        """A stream of its own, or the one that another sweep is starting at the same time."""
        later = [others for other, others in self.unchecked.items() if other != key]
        self.unchecked.clear()
        if not configs[0].share_stream:
            return await start_stream(name, key, configs, fitted, later)
        limit = configs[0].wait_limit_s
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            stream = await running_stream(name)
            try:
                if stream is None:
                    stream = await start_stream(name, key, configs, fitted, later)
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

    async def called(self, name: str) -> Stream:
        """The stream of that name, once it has started."""
        for stream in self.running:
            if stream.about.name == name:
                return stream
        return await asyncio.shield(self.starting[name])

    async def end(self) -> None:
        """Ends what the sweep has started, and parts from what it shares."""
        for pack in self.state.packs.values():
            ray.kill(pack.launcher)
        for stream in self.running:
            if stream.shared:
                await self.part_from(stream)
            else:
                for a in stream.actors():
                    ray.kill(a)
        self.running.clear()
        self.own.clear()

    async def end_own(self) -> None:
        """Streams that no pack reads any more make room for the next one."""
        await asyncio.gather(*self.starting.values(), return_exceptions=True)
        self.starting.clear()
        await self.write_caches()
        for stream in self.running:
            await self.look(stream)
        await self.end()

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
        self.state.resampling_tokens[gauges.incarnation] = gauges.resampling_tokens
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
            for stream in self.running
            if stream.config.activation_cache is not None
            for h in stream.harvesters
        ]
        if flushes:
            await asyncio.wait(
                [asyncio.ensure_future(as_future(f)) for f in flushes], timeout=FLUSH_SECONDS
            )

    async def renew(self) -> None:
        """Signs of life to streams that others share."""
        for stream in self.running:
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
