"""Roster: the meeting point of Tune's trials and the packs. One async actor per sweep.

A trial enlists with its config; once the expected trials are there (or no new one has come for a
while) they are cut into packs and each pack is launched. Reports flow back per SAE; a trial that
Tune stops withdraws, and its SAE leaves its pack. The roster also writes what a sweep leaves
behind: metrics, wandb runs, results.

An SAE's life:

    waiting ──pack launched──► training ──last step──► evaluating ──► done
                                  └── withdrawn ──► stopped      └── NaN, broken pack ──► failed
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
import yaml

from saeray import __version__
from saeray.cluster.launch import NAMESPACE, Stream, actor, cluster_now, fit_pack, start_stream
from saeray.config import LanguageModelSAERunnerConfig, digest, stream_key
from saeray.errors import ConfigError, Late, SaerayError
from saeray.grid import SAE, refuse_duplicates
from saeray.messages import (
    DONE,
    ENDS,
    EVALUATING,
    FAILED,
    NOTHING,
    STOPPED,
    TRAINING,
    WAITING,
    Gauges,
    PackPlan,
    ReaderGauges,
    Report,
    Result,
    SAERow,
    SweepStatus,
)
from saeray.plan import Fitted, cut_packs, fit, wants_gpu
from saeray.results import result_row, varying_fields, write_pareto, write_results
from saeray.storage import Folder
from saeray.tracking import Tracker

logger = logging.getLogger(__name__)

GATHER_SECONDS = 8.0  # without a new trial: those that are there are all there are
POLL_SECONDS = 2.0  # a call never waits longer than this; callers ask again
CLOSE_SECONDS = 60.0  # for packs to save what they have and end
LEASE_SECONDS = 120.0  # without a sign of a trial or driver: the sweep is abandoned


def roster_name(sweep: str, folder: str) -> str:
    """Sweeps of one name in different folders are different sweeps."""
    return f"roster:{sweep}:{digest(folder, 6)}"


def find_or_create(sweep: str, folder: str) -> Any:
    """The sweep's roster. It belongs to no one process and goes when the sweep is over."""
    return actor(
        Roster,
        name=roster_name(sweep, folder),
        lifetime="detached",
        get_if_exists=True,
        max_concurrency=1000,
    ).remote(sweep, folder)


async def as_future(ref: Any) -> Any:
    return await ref


@dataclass
class Entry:
    """One SAE."""

    name: str
    config: LanguageModelSAERunnerConfig
    state: str = WAITING
    number: int = 0  # of the newest result
    step: int = 0
    n_training_tokens: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    path: str | None = None
    attached: bool = False  # a trial is there for it
    withdrawn: bool = False
    pending: deque[tuple[Report, asyncio.Task[Any] | None]] = field(default_factory=deque)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ended(self) -> bool:
        return self.state in ENDS


@dataclass
class PackState:
    """A launched pack."""

    name: str
    members: list[str]
    task: Any = None  # `run_pack` of it
    run: Any = None  # reference of its trainer's task
    stream: Stream | None = None
    plan: PackPlan | None = None  # once the stream is there
    reader: ReaderGauges | None = None
    heard_of: bool = False  # its trainer is up and has asked for the plan


class Roster:
    """The actor."""

    def __init__(self, sweep: str, folder: str) -> None:
        self.sweep = sweep
        self.folder = Folder.at(folder)
        self.name = roster_name(sweep, folder)
        self.entries: dict[str, Entry] = {}
        self.streams: list[Stream] = []
        self.packs: dict[str, PackState] = {}
        # Packs that wait for room, each with the stream it will read.
        self.queue: deque[tuple[asyncio.Task[Stream], list[SAE], Fitted]] = deque()
        self.phase = "gathering trials"
        self.error: BaseException | None = None
        self.warnings: list[str] = []
        self.tracker = Tracker(sweep, self.folder)
        self.tracking = ThreadPoolExecutor(1, "tracking")
        self.evaluation_tokens = 0
        self.training_since: float | None = None
        self.last_seen = time.monotonic()
        self.last_enlisted = time.monotonic()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.gathering: asyncio.Task[Any] | None = None
        self.watching = False
        self.closed = False  # closing, or closed
        self.gone = asyncio.Event()  # closed, with all there was to do
        self.token_counts: Any = None
        self.provenance: dict[str, Any] = {"saeray": __version__, "ray": ray.__version__}

    # --- trials and drivers -----------------------------------------------------------------

    async def begin(self, configs: dict[str, dict[str, Any]], provenance: dict[str, Any]) -> None:
        """All SAEs of a sweep at once: nothing needs to be gathered, packs start right away."""
        self.seen()
        self.provenance = provenance
        for name, config in configs.items():
            self.add(name, LanguageModelSAERunnerConfig.from_dict(config))
        self.do(self.launch([e for e in self.entries.values() if e.state == WAITING]))

    async def enlist(self, name: str, config: dict[str, Any]) -> None:
        """A trial reports for duty. Enlisting twice is harmless; a stopped SAE goes on."""
        self.seen()
        self.raise_error()
        entry = self.entries.get(name)
        if entry is None:
            entry = self.add(name, LanguageModelSAERunnerConfig.from_dict(config))
            self.last_enlisted = time.monotonic()
            if self.gathering is None or self.gathering.done():
                self.gathering = self.do(self.gather())
        elif entry.state == STOPPED:  # paused by Tune and taken up again
            entry.state, entry.withdrawn = WAITING, False
            self.do(self.launch([entry]))
        elif entry.attached and entry.config.to_dict() != config:
            raise ConfigError(f"duplicate trial {name}: another trial has enlisted under it.")
        entry.attached = True

    async def next_result(self, name: str, after: int) -> Result | None:
        """The newest result of an SAE, once it is newer than `after`; None: not yet, ask again."""
        self.seen()
        entry = self.entries[name]
        deadline = time.monotonic() + POLL_SECONDS
        while entry.number <= after:
            self.raise_error()
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            try:
                await asyncio.wait_for(entry.news.wait(), left)
            except (TimeoutError, asyncio.TimeoutError):
                return None
        return self.result_of(entry)

    async def withdraw(self, name: str) -> None:
        """A trial was stopped: its SAE leaves its pack at the next log step."""
        self.seen()
        entry = self.entries.get(name)
        if entry is not None:
            entry.attached = False
            entry.withdrawn = not entry.ended

    async def status(self) -> SweepStatus:
        """The sweep as it stands, for the live view."""
        self.seen()
        gauges: list[Gauges] = []
        for stream in self.streams:
            try:
                gauges.append(await asyncio.wait_for(stream.buffer.gauges.remote(), POLL_SECONDS))
                self.token_counts = await asyncio.wait_for(
                    stream.token_server.counts.remote(), POLL_SECONDS
                )
            except (TimeoutError, asyncio.TimeoutError, ray.exceptions.RayError):
                continue  # busy or gone; the next look will tell
        counts = self.token_counts
        return SweepStatus(
            rows=[
                SAERow(
                    e.name, e.state, e.step, e.config.steps, e.n_training_tokens, e.metrics, e.error
                )
                for e in self.entries.values()
            ],
            phase=self.phase,
            harvested_tokens=sum(g.harvested_tokens for g in gauges),
            trained_tokens=sum(e.n_training_tokens for e in self.entries.values()),
            stream_tokens=sum(s.config.stream_tokens or 0 for s in self.streams),
            gauges=gauges,
            readers={p.name: p.reader for p in self.packs.values() if p.reader is not None},
            warnings=self.warnings + self.tracker.warnings + (counts.warnings if counts else []),
            error=None if self.error is None else str(self.error),
            bad_input=isinstance(self.error, ConfigError),
            epochs=counts.epochs if counts else 1,
            skipped_rows=counts.skipped_rows if counts else 0,
            evaluation_tokens=self.evaluation_tokens,
            packs=[p.members for p in self.packs.values()],
            training_since=self.training_since,
        )

    async def close(self, wait: bool = True) -> None:
        """Ends everything the sweep has started, after the last lines are written.

        Packs that still train are told to stop, which makes them save what they have; a worker
        group that is killed instead would leave its placement group behind. Without `wait` they
        are not waited for: for a Ray instance that ends anyway.
        """
        if self.closed:
            await self.gone.wait()
            return
        self.closed = True
        self.phase = "closing"
        for entry in self.entries.values():
            entry.withdrawn = not entry.ended
        runs = [pack.task for pack in self.packs.values() if not pack.task.done()]
        if runs and wait:
            await asyncio.wait(runs, timeout=CLOSE_SECONDS)
        for pack in self.packs.values():
            if not pack.task.done():
                ray.cancel(pack.run, force=True)
        for entry in self.entries.values():
            if not entry.ended:
                self.end(entry, STOPPED, "the sweep was ended before it was trained")
        await asyncio.get_running_loop().run_in_executor(self.tracking, self.tracker.close)
        for stream in self.streams:
            for a in stream.actors():
                ray.kill(a)
        self.streams.clear()
        await asyncio.to_thread((self.folder / ".ray").delete)
        self.gone.set()

    # --- packs ------------------------------------------------------------------------------

    async def plan(self, pack: str) -> PackPlan | None:
        """What a pack's workers shall do; None: its stream is not there yet, ask again.

        Where there is nothing to do any more the plan is `NOTHING`: a trainer that simply returns
        gives back its placement group, one that fails would be started again first.
        """
        state = self.packs[pack]
        state.heard_of = True
        deadline = time.monotonic() + POLL_SECONDS
        while state.plan is None and time.monotonic() < deadline:
            if self.closed or self.error is not None:
                return NOTHING
            await asyncio.sleep(0.05)
        return state.plan

    async def report(
        self, pack: str, reports: list[Report], reader: ReaderGauges | None
    ) -> list[str]:
        """News of some of a pack's SAEs; answers with those that shall leave it."""
        state = self.packs[pack]
        state.reader = reader
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
                task.add_done_callback(partial(self.settle_later, entry))
            entry.pending.append((r, task))
            self.settle(entry)
        return [n for n in state.members if self.entries[n].withdrawn]

    async def evaluated(self, pack: str) -> bool | None:
        """Whether nothing of the pack waits for an evaluation any more; None: ask again."""
        deadline = time.monotonic() + POLL_SECONDS
        while any(self.entries[n].pending for n in self.packs[pack].members):
            if time.monotonic() > deadline:
                return None
            await asyncio.sleep(0.05)
        return True

    async def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    # --- gathering and launching ------------------------------------------------------------

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
        try:
            by_stream: dict[str, list[SAE]] = {}
            for e in entries:
                by_stream.setdefault(stream_key(e.config), []).append(SAE(e.name, e.config))
            for key, saes in by_stream.items():
                config = saes[0].config
                cluster = cluster_now()
                fitted = fit(config.resources, cluster, len(saes), wants_gpu(config, cluster))
                starting = self.do(self.stream_for(key, saes, fitted))
                starting.add_done_callback(self.stream_started)
                for members in cut_packs(saes, fitted.saes_per_trainer):
                    self.queue.append((starting, members, fitted))
            self.launch_next()
        except Exception as error:
            self.give_up(error)

    def stream_started(self, starting: asyncio.Task[Stream]) -> None:
        if not starting.cancelled() and starting.exception() is not None:
            self.give_up(starting.exception() or SaerayError("the stream did not start"))
        elif self.training_since is None:
            self.phase = "starting trainers"

    async def stream_for(self, key: str, saes: list[SAE], fitted: Fitted) -> Stream:
        """The stream that serves these SAEs: one that runs already, or a new one."""
        configs = [s.config for s in saes]
        hooks = {c.resolved_hook_point for c in configs}
        for stream in self.streams:
            if stream.key == key and hooks <= set(stream.hook_points):
                return stream
        self.phase = "loading the language model and the text"
        stream = await start_stream(key, configs, fitted)
        self.streams.append(stream)
        self.write_sweep_yaml(fitted)
        return stream

    def launch_next(self) -> None:
        """Launches waiting packs while the cluster has room for them."""
        cluster = cluster_now()
        while self.queue:
            starting, saes, fitted = self.queue[0]
            if len(self.packs) - self.n_ended_packs() >= fitted.packs_at_once(cluster):
                return
            self.queue.popleft()
            name = f"pack-{len(self.packs) + 1:03d}"
            pack = self.packs[name] = PackState(name, [s.name for s in saes])
            for s in saes:
                self.entries[s.name].state = TRAINING
            pack.task = self.do(self.run_pack(pack, starting, saes, fitted))

    def n_ended_packs(self) -> int:
        return sum(all(self.entries[n].ended for n in p.members) for p in self.packs.values())

    async def run_pack(
        self, pack: PackState, starting: asyncio.Task[Stream], saes: list[SAE], fitted: Fitted
    ) -> None:
        """One pack from launch to end."""
        limit = saes[0].config.wait_limit_s
        pack.run = (
            ray.remote(fit_pack)
            .options(num_cpus=0, scheduling_strategy="DEFAULT")
            .remote(
                ray.get_actor(self.name, NAMESPACE),
                pack.name,
                limit,
                fitted,
                (self.folder / ".ray").uri,
                self.sweep,
            )
        )
        problem = "its trainer ended early"
        try:
            pack.stream = await starting
            await pack.stream.buffer.expect.remote(pack.name, 0)
            pack.plan = self.plan_of(pack.stream, pack.name, saes, fitted)
        except Exception as error:
            problem = str(error)
            pack.plan = NOTHING
        # In any case: a trainer whose launcher is not waited for leaves its placement group behind.
        try:
            await self.until_ended(pack, fitted, limit)
        except Exception as error:
            problem = f"its trainer failed: {error}"
        for name in pack.members:
            entry = self.entries[name]
            while entry.pending:
                await asyncio.sleep(0.05)
            if not entry.ended:
                self.end(entry, FAILED, f"{name}: {problem}")
        if not self.closed:
            if pack.stream is not None:
                await pack.stream.buffer.leave.remote(pack.name)
            self.launch_next()

    async def until_ended(self, pack: PackState, fitted: Fitted, limit: float) -> None:
        """Waits for the pack's trainer.

        Raises:
            Late: it has not come up within `limit`.
        """
        done, _ = await asyncio.wait([asyncio.ensure_future(as_future(pack.run))], timeout=limit)
        if not done and not pack.heard_of:
            ray.cancel(pack.run, force=True)
            raise Late(
                f"its trainer did not start within {limit:g} s (wait_limit_s): it needs "
                f"{fitted.num_workers} x {fitted.trainer_cpus:g} CPUs and "
                f"{fitted.trainer_gpus:g} GPUs, and of the cluster's {ray.cluster_resources()} "
                f"{ray.available_resources()} are free."
            )
        await pack.run

    def plan_of(self, stream: Stream, pack: str, saes: list[SAE], fitted: Fitted) -> PackPlan:
        hook_point = saes[0].config.resolved_hook_point
        return PackPlan(
            pack=pack,
            configs={s.name: s.config.to_dict() for s in saes},
            folder=self.folder.uri,
            hook_index=stream.hook_points.index(hook_point),
            d_in=stream.widths[hook_point],
            order=stream.plan.order,
            buffer=stream.buffer,
            threads=fitted.threads,
        )

    def give_up(self, error: BaseException) -> None:
        """The whole sweep can't go on."""
        cause = getattr(error, "cause", None)
        self.error = cause if isinstance(cause, SaerayError) else error
        self.phase = "failed"
        for entry in self.entries.values():
            if not entry.ended:
                self.end(entry, FAILED, str(self.error))

    # --- reports to results -----------------------------------------------------------------

    async def evaluate(self, entry: Entry, stream: Stream, weights: Any) -> dict[str, Any]:
        """Metrics of a snapshot on the held-out windows."""
        harvester = stream.harvesters[stream.evaluations % len(stream.harvesters)]
        stream.evaluations += 1
        metrics = await harvester.evaluate.remote(
            weights, entry.config.resolved_hook_point, stream.held_out
        )
        self.evaluation_tokens += metrics["eval/n_tokens"]
        return metrics

    def settle_later(self, entry: Entry, _: asyncio.Task[Any]) -> None:
        self.settle(entry)

    def settle(self, entry: Entry) -> None:
        """Passes on reports in their order, as far as their evaluations are there."""
        while entry.pending:
            report, evaluation = entry.pending[0]
            metrics, error = dict(report.metrics), report.error
            if evaluation is not None:
                if not evaluation.done():
                    return
                failure = evaluation.exception()
                if failure is None:
                    metrics.update(evaluation.result())
                else:
                    self.warnings.append(f"{entry.name}: not evaluated: {failure}")
            entry.pending.popleft()
            self.log(entry, report.step, metrics)
            entry.path = report.path
            if report.state in ENDS:
                self.end(entry, report.state, error)
            else:
                self.publish(entry)

    def log(self, entry: Entry, step: int, metrics: dict[str, Any]) -> None:
        entry.metrics = {**entry.metrics, **metrics}
        self.track(self.tracker.log, entry.name, step, metrics)

    def end(self, entry: Entry, state: str, error: str | None) -> None:
        """An SAE's end: its row is written before its trial hears of it."""
        entry.state, entry.error = state, error
        self.track(self.tracker.finish, entry.name, state == FAILED)
        try:
            self.write_results()
        except Exception as problem:
            self.warnings.append(f"results could not be written: {problem}")
        self.publish(entry)

    def publish(self, entry: Entry) -> None:
        entry.number += 1
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

    def write_results(self) -> None:
        entries = list(self.entries.values())
        axes = varying_fields([e.config for e in entries])
        rows = [
            result_row(e.name, e.config, axes, e.state, e.path, e.metrics, e.error) for e in entries
        ]
        write_results(self.folder, rows)
        if all(e.ended for e in entries):
            write_pareto(self.folder, rows, self.sweep)

    def write_sweep_yaml(self, fitted: Fitted) -> None:
        """The resolved configs and what they were run with."""
        data = {
            "name": self.sweep,
            "versions": self.provenance,
            "resources": vars(fitted),
            "saes": {e.name: e.config.to_dict() for e in self.entries.values()},
        }
        self.folder.write("sweep.yaml", yaml.safe_dump(data, sort_keys=False).encode())

    # --- housekeeping -----------------------------------------------------------------------

    def add(self, name: str, config: LanguageModelSAERunnerConfig) -> Entry:
        known = [SAE(e.name, e.config) for e in self.entries.values()]
        refuse_duplicates([*known, SAE(name, config)])
        entry = self.entries[name] = Entry(name, config)
        self.track(self.tracker.open, name, config)
        if not self.watching:
            self.watching = True
            self.do(self.watch())
        return entry

    def track(self, call: Any, *args: Any) -> None:
        """Runs a call of the tracker in its own thread, in order."""

        def guarded() -> None:
            try:
                call(*args)
            except Exception as error:
                text = f"tracking: {type(error).__name__}: {error}"
                if text not in self.warnings:
                    self.warnings.append(text)

        self.tracking.submit(guarded)

    def do(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def seen(self) -> None:
        self.last_seen = time.monotonic()

    def raise_error(self) -> None:
        if self.error is not None:
            raise (
                self.error if isinstance(self.error, SaerayError) else SaerayError(str(self.error))
            )

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
