"""Roster: the meeting point of Tune's trials and the packs. One async actor per sweep.

A trial enlists with its config; once the expected trials are there (or no new one has come for a
while) they are cut into packs and each pack is launched. Reports flow back per SAE; a trial that
Tune stops withdraws, and its SAE leaves its pack. The roster also writes what a sweep leaves
behind: metrics, wandb runs, results.

An SAE's life:

    waiting ──pack launched──► training ──last step──► evaluating ──► done
                                  │── withdrawn ──► stopped      └── NaN ──► failed
                                  └── sweep or pack ended ──► interrupted ──resumed──► waiting

A roster that died is started again by Ray: it reads the sweep's folder, finds its streams and
packs by their names, and they tell it again what it has not settled. Meanwhile they go on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayError

from saeray import __version__
from saeray.cluster.launch import (
    NAMESPACE,
    AboutPack,
    Stream,
    actor,
    cluster_now,
    found_again,
    on_head,
    passed_on,
    start_launcher,
    start_stream,
)
from saeray.cluster.waiting import POLL_SECONDS, NotYet
from saeray.config import LanguageModelSAERunnerConfig, digest, stream_key
from saeray.errors import ConfigError, SaerayError
from saeray.grid import SAE, refuse_duplicates
from saeray.messages import (
    DONE,
    ENDS,
    EVALUATING,
    FAILED,
    INTERRUPTED,
    NOTHING,
    STOPPED,
    TRAINING,
    WAITING,
    Answer,
    Gauges,
    PackPlan,
    ReaderGauges,
    Report,
    Result,
    SAERow,
    SweepStatus,
    reader_name,
)
from saeray.plan import Fitted, cut_packs, fit, wants_gpu
from saeray.storage import Folder
from saeray.sweep_folder import Known, Memory, Outcome, SweepFolder
from saeray.tracking import Tracker

logger = logging.getLogger(__name__)

GATHER_SECONDS = 8.0  # without a new trial: those that are there are all there are
CLOSE_SECONDS = 60.0  # for packs to save what they have and end
LEASE_SECONDS = 120.0  # without a sign of a trial or driver: the sweep is abandoned


def roster_name(sweep: str, folder: str) -> str:
    """Sweeps of one name in different folders are different sweeps."""
    return f"roster:{sweep}:{digest(folder, 6)}"


def find_or_create(sweep: str, folder: str) -> Any:
    """The sweep's roster. It belongs to no one process and goes when the sweep is over."""
    return actor(
        Roster,
        roster_name(sweep, folder),
        get_if_exists=True,
        max_concurrency=1000,
        **on_head(),
    ).remote(sweep, folder, passed_on())


@dataclass
class Entry:
    """One SAE."""

    name: str
    config: LanguageModelSAERunnerConfig
    state: str = WAITING
    step: int = 0
    n_training_tokens: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    path: str | None = None
    attached: bool = False  # a trial is there for it
    withdrawn: bool = False  # it shall leave its pack
    pending: deque[tuple[Report, asyncio.Task[Any] | None]] = field(default_factory=deque)
    settling: asyncio.Task[None] | None = None
    settled: int = 0  # step up to which its reports are evaluated and written
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        return self.state in ENDS

    @property
    def number(self) -> int:
        """Of its newest result: counts up, and is the same after the roster was started again."""
        return 2 * self.step + self.ended


@dataclass
class PackState:
    """A launched pack."""

    about: AboutPack
    launcher: Any = None
    task: Any = None  # `follow` of it
    stream: Stream | None = None  # once it is there
    nothing_to_do: bool = False  # its stream did not come about
    reader: ReaderGauges | None = None
    heard_of: bool = False  # its trainer is up and has asked for the plan
    problem: str | None = None  # why it can't go on, in its own words
    first_tokens: int = 0  # the least of its SAEs' newest checkpoints when it was launched

    @property
    def members(self) -> list[str]:
        return list(self.about.configs)

    @property
    def readers(self) -> list[str]:
        ranks = range(self.about.fitted.num_workers)
        return [reader_name(self.about.name, rank) for rank in ranks]


class Roster:
    """The actor."""

    def __init__(self, sweep: str, folder: str, environment: dict[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        self.sweep = sweep
        self.folder = Folder.at(folder)
        self.files = SweepFolder(self.folder, sweep)
        self.name = roster_name(sweep, folder)
        self.incarnation = uuid.uuid4().hex
        self.entries: dict[str, Entry] = {}
        self.streams: list[Stream] = []
        self.starting: dict[str, asyncio.Task[Stream]] = {}  # by the stream's name
        self.packs: dict[str, PackState] = {}
        self.queue: deque[tuple[str, list[SAE], Fitted]] = deque()  # packs that wait for room
        self.phase = "gathering trials"
        self.error: BaseException | None = None
        self.warnings: list[str] = []
        self.tracker = Tracker(sweep, self.folder)
        self.tracking = ThreadPoolExecutor(1, "tracking")
        self.remembering = asyncio.Lock()
        # LM tokens harvested and read from cache by each incarnation of a buffer.
        self.tokens: dict[str, tuple[int, int]] = {}
        self.evaluation_tokens = 0
        self.training_since: float | None = None
        self.last_seen = time.monotonic()
        self.last_enlisted = time.monotonic()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.gathering: asyncio.Task[Any] | None = None
        self.closed = False  # closing, or closed
        self.gone = asyncio.Event()  # closed, with all there was to do
        self.token_counts: Any = None
        self.provenance: dict[str, Any] = {"saeray": __version__, "ray": ray.__version__}
        # A call that arrives while memory comes back waits for it.
        self.ready = self.do(self.recall())
        self.do(self.watch())

    # --- trials and drivers -----------------------------------------------------------------

    async def begin(
        self, configs: dict[str, dict[str, Any]], provenance: dict[str, Any], resume: bool = False
    ) -> bool:
        """All SAEs of a sweep at once: nothing needs to be gathered, packs start right away.

        `resume`: with what the sweep's folder says of them. SAEs that train already go on. Answers
        False when the sweep is just being closed: ask again.
        """
        await self.ready
        self.seen()
        if self.closed:
            return False
        self.provenance = provenance
        new = [n for n in configs if n not in self.entries]
        known = await asyncio.to_thread(self.files.known, new) if resume else {}
        for name in new:
            config = LanguageModelSAERunnerConfig.from_dict(configs[name])
            self.add(name, config, known.get(name))
        for entry in self.entries.values():
            if entry.state == INTERRUPTED:
                self.take_up_again(entry)
        await self.remember()
        await self.launch([e for e in self.entries.values() if e.state == WAITING])
        return True

    async def enlist(self, name: str, config: dict[str, Any]) -> None:
        """A trial reports for duty. Enlisting twice is harmless; a stopped SAE goes on."""
        await self.ready
        self.seen()
        self.raise_error()
        entry = self.entries.get(name)
        if entry is None:
            entry = self.add(name, LanguageModelSAERunnerConfig.from_dict(config))
            await self.remember()
            self.last_enlisted = time.monotonic()
            self.start_gathering()
        elif entry.state in (STOPPED, INTERRUPTED):  # paused by Tune and taken up again
            self.take_up_again(entry)
            await self.launch([entry])
        elif entry.attached and entry.config.to_dict() != config:
            raise ConfigError(f"duplicate trial {name}: another trial has enlisted under it.")
        entry.attached = True

    async def next_result(self, name: str, after: int) -> Result | NotYet:
        """The newest result of an SAE, once it is newer than `after`."""
        await self.ready
        self.seen()
        entry = self.entries[name]
        entry.attached = True
        deadline = time.monotonic() + POLL_SECONDS
        while entry.number <= after:
            self.raise_error()
            left = deadline - time.monotonic()
            if left <= 0:
                return NotYet(f"{name} ({entry.state})")
            try:
                await asyncio.wait_for(entry.news.wait(), left)
            except (TimeoutError, asyncio.TimeoutError):
                return NotYet(f"{name} ({entry.state})")
        return self.result_of(entry)

    async def withdraw(self, name: str) -> None:
        """A trial was stopped: its SAE leaves its pack at the next log step."""
        await self.ready
        self.seen()
        entry = self.entries.get(name)
        if entry is not None:
            entry.attached = False
            entry.withdrawn = not entry.ended

    async def status(self) -> SweepStatus:
        """The sweep as it stands, for the live view."""
        await self.ready
        self.seen()
        now: list[Gauges] = []
        for stream in self.streams:
            try:
                gauges = await asyncio.wait_for(stream.buffer.gauges.remote(), POLL_SECONDS)
                now.append(gauges)
                await self.note(gauges)
                self.token_counts = await asyncio.wait_for(
                    stream.token_server.counts.remote(), POLL_SECONDS
                )
            except (TimeoutError, asyncio.TimeoutError, RayError):
                continue  # busy or being started again; the next look will tell
        counts = self.token_counts
        return SweepStatus(
            rows=[
                SAERow(
                    e.name, e.state, e.step, e.config.steps, e.n_training_tokens, e.metrics, e.error
                )
                for e in self.entries.values()
            ],
            phase=self.phase,
            # What a buffer that died has harvested was harvested all the same.
            harvested_tokens=sum(harvested for harvested, _ in self.tokens.values()),
            cached_tokens=sum(cached for _, cached in self.tokens.values()),
            trained_tokens=sum(e.n_training_tokens for e in self.entries.values()),
            stream_tokens=sum(s.config.stream_tokens or 0 for s in self.streams),
            gauges=now,
            readers={n: p.reader for n, p in self.packs.items() if p.reader is not None},
            warnings=[
                *self.warnings,
                *self.tracker.warnings,
                *(counts.warnings if counts else []),
            ],
            error=None if self.error is None else str(self.error),
            bad_input=isinstance(self.error, ConfigError),
            epochs=counts.epochs if counts else 1,
            skipped_rows=counts.skipped_rows if counts else 0,
            evaluation_tokens=self.evaluation_tokens,
            packs=[p.members for p in self.packs.values()],
            training_since=self.training_since,
        )

    async def note(self, gauges: Gauges) -> None:
        """Keeps what would be gone with a buffer."""
        new = gauges.incarnation not in self.tokens
        self.tokens[gauges.incarnation] = (gauges.harvested_tokens, gauges.cached_tokens)
        for text in gauges.warnings:
            await self.warn(text)
        if new and len(self.tokens) > 1:
            await self.remember()

    async def close(self, wait: bool = True) -> None:
        """Ends everything the sweep has started, after the last lines are written.

        Packs that still train are told to stop, which makes them save what they have; a worker
        group that is killed instead would leave its placement group behind. Without `wait` they
        are not waited for: for a Ray instance that ends anyway.
        """
        await self.ready
        if self.closed:
            await self.gone.wait()
            return
        async with self.remembering:
            self.closed = True
        self.phase = "closing"
        for entry in self.entries.values():
            entry.withdrawn = not entry.ended
        following = [pack.task for pack in self.packs.values() if not pack.task.done()]
        if following and wait:
            await asyncio.wait(following, timeout=CLOSE_SECONDS)
        for entry in self.entries.values():
            if not entry.ended:
                self.end(entry, INTERRUPTED, "the sweep was ended before it was trained")
        await asyncio.get_running_loop().run_in_executor(self.tracking, self.tracker.close)
        if wait:
            await self.write_caches()
        for pack in self.packs.values():
            ray.kill(pack.launcher)
        for stream in self.streams:
            for a in stream.actors():
                ray.kill(a)
        self.streams.clear()
        await asyncio.to_thread((self.folder / ".ray").delete)
        self.gone.set()

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

    # --- packs ------------------------------------------------------------------------------

    async def plan(self, pack: str) -> PackPlan | NotYet:
        """What a pack's workers shall do: those of its SAEs that have not ended.

        Where there is nothing to do any more the plan is `NOTHING`: a trainer that simply returns
        gives back its placement group, one that fails would be started again first.
        """
        await self.ready
        state = self.packs.get(pack)
        if state is None:
            return NOTHING
        state.heard_of = True
        deadline = time.monotonic() + POLL_SECONDS
        while state.stream is None and time.monotonic() < deadline:
            if self.closed or self.error is not None or state.nothing_to_do:
                return NOTHING
            await asyncio.sleep(0.05)
        if state.stream is None:
            return NotYet("the harvesters and the token server (loading the model and the text)")
        stream, about = state.stream.about, state.about
        configs = {n: c for n, c in about.configs.items() if not self.entries[n].ended}
        if not configs:
            return NOTHING
        first = LanguageModelSAERunnerConfig.from_dict(next(iter(configs.values())))
        return PackPlan(
            pack=pack,
            configs=configs,
            folder=self.folder.uri,
            hook_index=stream.hook_points.index(first.resolved_hook_point),
            d_in=stream.widths[first.resolved_hook_point],
            order=stream.plan.order,
            buffer=state.stream.buffer,
            threads=about.fitted.threads,
        )

    async def report(self, pack: str, reports: list[Report], reader: ReaderGauges | None) -> Answer:
        """News of some of a pack's SAEs. Reporting twice is harmless."""
        await self.ready
        state = self.packs.get(pack)
        if state is None:  # launched by a former incarnation, and given up by it
            return Answer(self.incarnation, [r.name for r in reports], {})
        state.reader = reader
        if reports and not self.closed:
            self.phase = "training"
            if self.training_since is None:
                self.training_since = time.time()
        for r in reports:
            entry = self.entries[r.name]
            if entry.ended:
                continue
            entry.step, entry.n_training_tokens = r.step, r.n_training_tokens
            if r.state in (DONE, STOPPED):
                entry.state = EVALUATING
            task = None
            if r.snapshot is not None:
                assert state.stream is not None
                task = self.do(self.evaluate(entry, state.stream, r.snapshot[0]))
            entry.pending.append((r, task))
            if entry.settling is None or entry.settling.done():
                entry.settling = self.do(self.settle(entry))
        return self.answer(state)

    async def settled(self, pack: str) -> Answer | NotYet:
        """An answer once nothing of the pack waits for its evaluation any more."""
        await self.ready
        state = self.packs.get(pack)
        if state is None:
            return Answer(self.incarnation, [], {})
        deadline = time.monotonic() + POLL_SECONDS
        while any(self.entries[n].pending for n in state.members):
            if time.monotonic() > deadline:
                return NotYet("the harvesters (evaluation)")
            await asyncio.sleep(0.05)
        return self.answer(state)

    def answer(self, pack: PackState) -> Answer:
        entries = [self.entries[n] for n in pack.members]
        return Answer(
            self.incarnation,
            [e.name for e in entries if e.withdrawn],
            {e.name: e.config.steps if e.ended else e.settled for e in entries},
        )

    async def broken(self, pack: str, problem: str) -> None:
        """A pack says why it can't go on; starting it again would not help."""
        await self.ready
        if pack in self.packs:
            self.packs[pack].problem = problem

    async def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)
            await self.remember()

    # --- gathering and launching ------------------------------------------------------------

    def start_gathering(self) -> None:
        if self.gathering is None or self.gathering.done():
            self.gathering = self.do(self.gather())

    async def gather(self) -> None:
        """Waits until no trial has come for GATHER_SECONDS, then launches those that are there."""
        while time.monotonic() - self.last_enlisted < GATHER_SECONDS:
            await asyncio.sleep(0.2)
        await self.launch([e for e in self.entries.values() if e.state == WAITING])

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
                config = saes[0].config
                cluster = cluster_now()
                fitted = fit(config.resources, cluster, len(saes), wants_gpu(config, cluster))
                stream = self.stream_for(key, saes, fitted)
                for members in cut_packs(saes, fitted.saes_per_trainer):
                    self.queue.append((stream, members, fitted))
            self.launch_next()
        except Exception as error:
            self.give_up(error)

    def stream_for(self, key: str, saes: list[SAE], fitted: Fitted) -> str:
        """The name of the stream that serves these SAEs: one that runs already, or a new one."""
        configs = [s.config for s in saes]
        hooks = {c.resolved_hook_point for c in configs}
        for stream in self.streams:
            if stream.about.key == key and hooks <= set(stream.about.hook_points):
                self.do(self.write_sweep_yaml(fitted))
                return stream.about.name
        name = f"{self.name}/stream-{uuid.uuid4().hex[:6]}"
        self.starting[name] = self.do(self.start(name, key, configs, fitted))
        return name

    async def start(
        self, name: str, key: str, configs: list[LanguageModelSAERunnerConfig], fitted: Fitted
    ) -> Stream:
        self.phase = "loading the language model and the text"
        try:
            stream = await start_stream(name, key, configs, fitted)
        except Exception as error:
            self.give_up(error)
            raise
        self.streams.append(stream)
        await self.write_sweep_yaml(fitted)
        if self.training_since is None:
            self.phase = "starting trainers"
        return stream

    def launch_next(self) -> None:
        """Launches waiting packs while the cluster has room for them."""
        cluster = cluster_now()
        while self.queue and not self.closed and self.error is None:
            stream, saes, fitted = self.queue[0]
            running = sum(not p.task.done() for p in self.packs.values())
            if running >= fitted.packs_at_once(cluster):
                return
            self.queue.popleft()
            name = f"pack-{len(self.packs) + 1:03d}-{self.incarnation[:4]}"
            configs = {s.name: s.config.to_dict() for s in saes}
            about = AboutPack(name, stream, configs, fitted)
            pack = self.packs[name] = PackState(about)
            for s in saes:
                self.entries[s.name].state = TRAINING
            pack.launcher = start_launcher(
                f"{self.name}/{name}",
                about,
                ray.get_actor(self.name, NAMESPACE),
                (self.folder / ".ray").uri,
                saes[0].config.wait_limit_s,
            )
            self.begin_following(pack, saes[0].config)

    def begin_following(self, pack: PackState, config: LanguageModelSAERunnerConfig) -> None:
        """However it ends, the pack's room is then free for the next one."""
        pack.task = self.do(self.follow(pack, config))
        pack.task.add_done_callback(lambda _: self.launch_next())

    async def follow(self, pack: PackState, config: LanguageModelSAERunnerConfig) -> None:
        """One pack from its launch to its end; no SAE of it is left without one."""
        try:
            await self.follow_through(pack, config)
        except Exception as error:
            logger.exception("following %s", pack.about.name)
            for name in pack.members:
                if not self.entries[name].ended:
                    self.end(self.entries[name], INTERRUPTED, f"{name}: {error!r}")

    async def follow_through(self, pack: PackState, config: LanguageModelSAERunnerConfig) -> None:
        problem: str | None = None
        try:
            pack.first_tokens = await asyncio.to_thread(self.saved_tokens, pack.members)
            stream = await self.stream_called(pack.about.stream)
            order = stream.about.plan.order
            first_window = order.window_of(pack.first_tokens)
            for reader in pack.readers:
                await steadily(partial(stream.buffer.expect.remote, reader, first_window))
            pack.stream = stream
        except Exception as error:
            problem = str(error)
            pack.nothing_to_do = True
        # In any case: a trainer whose launcher is not waited for leaves its placement group behind.
        ended = await self.end_of(pack, config.wait_limit_s)
        for name in pack.members:
            entry = self.entries[name]
            if entry.settling is not None:
                await entry.settling
        if self.closed:
            return
        left = [self.entries[n] for n in pack.members if not self.entries[n].ended]
        problem = pack.problem or problem or ended or "its trainer ended early"
        if pack.stream is not None:
            for reader in pack.readers:
                await steadily(partial(pack.stream.buffer.leave.remote, reader))
        if left and pack.problem is None and self.error is None:
            saved = await asyncio.to_thread(self.saved_tokens, [e.name for e in left])
            # One that got no further than at its last start would not next time either.
            if saved > pack.first_tokens:
                await self.warn(f"{pack.about.name}: {problem}; started again.")
                saes = [SAE(e.name, e.config) for e in left]
                self.queue.appendleft((pack.about.stream, saes, pack.about.fitted))
                left = []
        for entry in left:
            self.end(entry, INTERRUPTED, f"{entry.name}: {problem}")

    async def stream_called(self, name: str) -> Stream:
        for stream in self.streams:
            if stream.about.name == name:
                return stream
        return await asyncio.shield(self.starting[name])

    def saved_tokens(self, names: Sequence[str]) -> int:
        """The least of these SAEs' newest checkpoints, in tokens; 0 where one has none."""
        saved = []
        for name in names:
            folder = self.folder / "trials" / name / "checkpoints"
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
                    f"its trainer did not start within {limit:g} s (wait_limit_s): it needs "
                    f"{fitted.num_workers} x {fitted.trainer_cpus:g} CPUs and "
                    f"{fitted.trainer_gpus:g} GPUs, and of the cluster's {ray.cluster_resources()} "
                    f"{ray.available_resources()} are free."
                )

    def give_up(self, error: BaseException) -> None:
        """The whole sweep can't go on."""
        cause = getattr(error, "cause", None)
        self.error = cause if isinstance(cause, SaerayError) else error
        self.phase = "failed"
        for entry in self.entries.values():
            if not entry.ended:
                self.end(entry, INTERRUPTED, str(self.error))

    # --- reports to results -----------------------------------------------------------------

    async def evaluate(self, entry: Entry, stream: Stream, weights: Any) -> dict[str, Any]:
        """Metrics of a snapshot on the held-out windows."""
        if stream.held_out is None:
            stream.held_out = stream.token_server.held_out.remote()
        harvester = stream.harvesters[stream.evaluations % len(stream.harvesters)]
        stream.evaluations += 1
        metrics = await harvester.evaluate.remote(
            weights, entry.config.resolved_hook_point, stream.held_out
        )
        self.evaluation_tokens += metrics["eval/n_tokens"]
        return metrics

    async def settle(self, entry: Entry) -> None:
        """Passes on an SAE's reports in their order, as their evaluations come in."""
        while entry.pending:
            report, evaluation = entry.pending[0]
            metrics = dict(report.metrics)
            if evaluation is not None:
                try:
                    metrics.update(await evaluation)
                except Exception as error:
                    if is_lost(error):  # with the pack, which is started again and reports again
                        entry.pending.popleft()
                        continue
                    await self.warn(f"{entry.name}: not evaluated: {error}")
            state = report.state
            if state == STOPPED and self.closed:
                state = INTERRUPTED
            entry.metrics, entry.path = {**entry.metrics, **metrics}, report.path
            # The log shall be that of an uninterrupted run once this one has gone on, and that one
            # is not evaluated here.
            line = report.metrics if state == INTERRUPTED else metrics
            written = self.track(self.tracker.log, entry.name, report.step, line, state in ENDS)
            if state in ENDS:
                await asyncio.wrap_future(written)
                self.end(entry, state, report.error)
            else:
                self.do(self.note_settled(entry, written))
                self.publish(entry)
            entry.pending.popleft()

    async def note_settled(self, entry: Entry, written: Any) -> None:
        entry.settled = max(entry.settled, await asyncio.wrap_future(written) or 0)

    def end(self, entry: Entry, state: str, error: str | None) -> None:
        """An SAE's end: its row is written before its trial hears of it."""
        entry.state, entry.error = state, error
        self.track(self.tracker.finish, entry.name, state == FAILED)
        try:
            self.files.write_results([self.outcome_of(e) for e in self.entries.values()])
        except Exception as problem:
            self.warnings.append(f"results could not be written: {problem}")
        self.publish(entry)

    def outcome_of(self, e: Entry) -> Outcome:
        return Outcome(e.name, e.config, e.state, e.path, e.metrics, e.error)

    def publish(self, entry: Entry) -> None:
        entry.news.set()
        entry.news = asyncio.Event()

    def result_of(self, entry: Entry) -> Result:
        return Result(
            entry.number,
            entry.n_training_tokens,
            entry.step,
            {k: v for k, v in entry.metrics.items() if isinstance(v, (int, float))},
            entry.state,
            entry.error,
            entry.path,
            (self.folder / "trials" / entry.name).uri,
        )

    async def write_sweep_yaml(self, fitted: Fitted) -> None:
        configs = {e.name: e.config for e in self.entries.values()}
        await asyncio.to_thread(self.files.write_sweep_yaml, configs, self.provenance, vars(fitted))

    # --- housekeeping -----------------------------------------------------------------------

    def add(
        self, name: str, config: LanguageModelSAERunnerConfig, known: Known | None = None
    ) -> Entry:
        others = [SAE(e.name, e.config) for e in self.entries.values()]
        refuse_duplicates([*others, SAE(name, config)])
        entry = self.entries[name] = Entry(name, config)
        if known is not None:
            entry.state, entry.path, entry.error = known.state, known.path, known.error
            entry.step, entry.n_training_tokens = known.step, known.n_training_tokens
            entry.metrics, entry.settled = known.metrics, known.step
            self.evaluation_tokens += known.evaluation_tokens
        if not entry.ended:
            self.track(self.tracker.open, name, config)
        return entry

    def take_up_again(self, entry: Entry) -> None:
        """A stopped or interrupted SAE waits for a pack again."""
        entry.state, entry.withdrawn, entry.error, entry.path = WAITING, False, None, None
        self.track(self.tracker.open, entry.name, entry.config)

    async def remember(self) -> None:
        """Writes down what `recall` needs."""
        async with self.remembering:
            if self.closed:
                return
            configs = {e.name: e.config.to_dict() for e in self.entries.values()}
            memory = Memory(configs, self.provenance, list(self.warnings), dict(self.tokens))
            await asyncio.to_thread(self.files.remember, memory)

    async def recall(self) -> None:
        """What a roster that was started again must know: its SAEs, streams and packs."""
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            return
        memory = await asyncio.to_thread(self.files.recall)
        if memory is None:
            return
        self.provenance, self.warnings = memory.versions, memory.warnings
        self.tokens = {name: (n, cached) for name, (n, cached) in memory.tokens.items()}
        known = await asyncio.to_thread(self.files.known, list(memory.saes))
        for name, config in memory.saes.items():
            self.add(name, LanguageModelSAERunnerConfig.from_dict(config), known[name])
        self.streams, packs = await found_again(self.name)
        self.phase = "training"
        await self.warn("the roster died and was started again.")
        for about, launcher in packs:
            pack = self.packs[about.name] = PackState(about, launcher, heard_of=True)
            there = any(s.about.name == about.stream for s in self.streams)
            if there:
                for name in about.configs:
                    if not self.entries[name].ended:
                        self.entries[name].state = TRAINING
            else:
                self.starting[about.stream] = self.do(nowhere(about.stream))
            first = LanguageModelSAERunnerConfig.from_dict(next(iter(about.configs.values())))
            self.begin_following(pack, first)
        if any(e.state == WAITING for e in self.entries.values()):
            self.start_gathering()

    def track(self, call: Any, *args: Any) -> Any:
        """Runs a call of the tracker in its own thread, in order; a future of its result."""

        def guarded() -> Any:
            try:
                return call(*args)
            except Exception as error:
                text = f"tracking: {type(error).__name__}: {error}"
                if text not in self.warnings:
                    self.warnings.append(text)

        return self.tracking.submit(guarded)

    def do(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def seen(self) -> None:
        self.last_seen = time.monotonic()

    def raise_error(self) -> None:
        if self.error is not None:
            kind = type(self.error) if isinstance(self.error, SaerayError) else SaerayError
            raise kind(str(self.error))

    async def watch(self) -> None:
        """Ends the sweep when it is over or its driver and trials are gone."""
        while not self.closed:
            await asyncio.sleep(POLL_SECONDS)
            quiet = time.monotonic() - self.last_seen
            over = all(e.ended and not e.attached for e in self.entries.values())
            if quiet > LEASE_SECONDS or (over and quiet > 2 * GATHER_SECONDS):
                await self.close()
        # Detached, so nobody else would end it. An actor that is exiting takes no more calls, and
        # packs that are closing still make some.
        await self.gone.wait()
        await asyncio.sleep(1.0)
        ray.actor.exit_actor()


async def as_future(ref: Any) -> Any:
    return await ref


async def steadily(call: Callable[[], Any]) -> Any:
    """A call that is repeated while its actor is being started again."""
    while True:
        try:
            return await call()
        except ActorUnavailableError:
            await asyncio.sleep(0.2)


async def nowhere(stream: str) -> Stream:
    raise SaerayError(f"{stream} is not there any more")


def is_lost(error: BaseException) -> bool:
    """Whether an evaluation failed because the weights went with the process that owned them."""
    return isinstance(error, ObjectLostError) or isinstance(
        getattr(error, "cause", None), ObjectLostError
    )
