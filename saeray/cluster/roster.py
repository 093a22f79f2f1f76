"""Roster: the meeting point of Tune's trials and the packs. One async actor per sweep.

A trial enlists with its config; once the expected trials are there (or no new one has come for a
while) they are cut into packs and each pack is launched (`dispatch`), beside the stream it reads
(`streams`). Reports flow back per SAE (`reports`); a trial that Tune stops withdraws, and its SAE
leaves its pack.

A roster that died is started again by Ray: it reads the sweep's folder, finds its streams and
packs by their names, and they tell it again what it has not settled. Meanwhile they go on.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import ray

from saeray.actors.make import actor, passed_on
from saeray.actors.names import roster_name
from saeray.actors.nodes import on_head
from saeray.actors.waiting import POLL_SECONDS, NotYet
from saeray.cluster.dispatch import Dispatch
from saeray.cluster.overview import Overview
from saeray.cluster.reports import Reports
from saeray.cluster.streams import Streams
from saeray.cluster.sweep_state import Entry, SweepState
from saeray.errors import ConfigError, SaerayError
from saeray.files.sweep_folder import Known
from saeray.files.wandb_key import lacking
from saeray.spec.checks import cautions
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.grid import SAE, refuse_duplicates
from saeray.spec.messages import (
    ENDS,
    INTERRUPTED,
    STOPPED,
    WAITING,
    Answer,
    PackPlan,
    ReaderGauges,
    Report,
    Result,
    SweepStatus,
)

GATHER_SECONDS = 8.0  # without a new trial: those that are there are all there are
LEASE_SECONDS = 120.0  # without a sign of a trial or driver: the sweep is abandoned
OVER_SECONDS = 16.0  # the same, once all SAEs have ended and nobody but trials wants the sweep
RENEW_SECONDS = 20.0  # between signs of life: to shared streams, and in the cluster's registry


def find_or_create(sweep: str, folder: str) -> Any:
    """The sweep's roster. It belongs to no one process and goes when the sweep is over."""
    return actor(
        Roster,
        roster_name(sweep, folder),
        get_if_exists=True,
        max_concurrency=1000,
        **on_head(),
    ).remote(sweep, folder, passed_on())


class Roster:
    """The actor: what trials, drivers and packs may ask of a sweep."""

    def __init__(self, sweep: str, folder: str, environment: dict[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        self.state = SweepState(sweep, folder, roster_name(sweep, folder))
        self.reports = Reports(self.state)
        self.streams = Streams(self.state, self.reports)
        self.dispatch = Dispatch(self.state, self.reports, self.streams)
        self.driven = False  # by a process that closes it
        self.last_seen = time.monotonic()
        self.last_enlisted = time.monotonic()
        self.gathering: asyncio.Task[Any] | None = None
        self.reading: asyncio.Task[Any] | None = None  # what earlier sessions have left
        self.gone = asyncio.Event()  # closed, with all there was to do
        self.overview = Overview(self.state, self.reports, self.streams)
        self.reports.all_ended = self.all_ended
        # A call that arrives while memory comes back waits for it.
        self.ready = self.state.do(self.recall())
        self.state.do(self.watch())

    # --- trials and drivers -----------------------------------------------------------------

    async def begin(
        self, configs: dict[str, dict[str, Any]], provenance: dict[str, Any], resume: bool = False
    ) -> str | None:
        """All SAEs of a sweep at once: nothing needs to be gathered, packs start right away.

        `resume`: with what the sweep's folder says of them. SAEs that train already go on. Answers
        what tells the folder's disk (`head_folder`), or None when the sweep is just being closed:
        ask again.
        """
        await self.ready
        self.seen()
        if self.state.over:
            return None
        self.driven = True
        self.state.provenance = provenance
        new = [n for n in configs if n not in self.state.entries]
        known = await asyncio.to_thread(self.state.files.known, new) if resume else {}
        for name in new:
            config = LanguageModelSAERunnerConfig.from_dict(configs[name])
            self.add(name, config, known.get(name))
        for entry in self.state.entries.values():
            if entry.state == INTERRUPTED:
                self.take_up_again(entry)
        await self.state.remember()
        await self.dispatch.launch([e for e in self.state.entries.values() if e.state == WAITING])
        return self.state.marker

    async def enlist(self, name: str, config: dict[str, Any]) -> bool | None:
        """A trial reports for duty. Enlisting twice is harmless; a stopped SAE goes on.

        Answers None when the sweep is just being closed: ask its next roster.
        """
        await self.ready
        self.seen()
        self.state.raise_error()
        if not self.driven:
            if self.reading is None:
                self.reading = self.state.do(self.state.read_earlier())
            await self.reading
        if self.state.closed:
            return None
        entry = self.state.entries.get(name)
        while entry is not None and entry.withdrawn and entry.state not in (WAITING, *ENDS):
            await asyncio.sleep(0.05)  # it is on its way out of its pack
        if entry is None:
            entry = self.add(
                name,
                LanguageModelSAERunnerConfig.from_dict(config),
                await self.state.done_before(name),
            )
            await self.state.remember()
            if not entry.ended:
                self.start_gathering()
        elif entry.state in (STOPPED, INTERRUPTED):  # paused by Tune and taken up again
            self.take_up_again(entry)
            self.start_gathering()  # HyperBand wakes several, which then train together
        elif entry.attached and entry.config.to_dict() != config:
            raise ConfigError(f"duplicate trial {name}: another trial has enlisted under it.")
        entry.attached, entry.withdrawn = True, False
        return None if self.state.closed else True  # it may have begun to close meanwhile

    async def next_result(
        self, name: str, after: int, decides: bool = False, holds: bool = False
    ) -> Result | NotYet:
        """The newest result of an SAE, once it is newer than `after`.

        decides: for a scheduler or searcher, so that it has to have held-out figures. holds: the
        SAE shall stop where its trial is stopped, so that its pack waits for Tune's decisions.
        """
        await self.ready
        self.seen()
        entry = self.state.entries[name]
        entry.attached, entry.held, entry.heard = True, holds, after
        entry.decided_upon |= decides
        if await self.state.comes(entry, lambda: entry.number > after and entry.to_be_told):
            return self.reports.result_of(entry)
        return NotYet(f"{name} ({entry.state})")

    async def withdraw(self, name: str) -> None:
        """A trial was stopped: its SAE leaves its pack at the next log step."""
        await self.ready
        self.seen()
        entry = self.state.entries.get(name)
        if entry is not None:
            entry.attached = False
            entry.withdrawn = not entry.ended

    async def left(self, name: str) -> NotYet | None:
        """Answers once a withdrawn SAE has left its pack and is saved, or another trial has it."""
        await self.ready
        self.seen()
        entry = self.state.entries.get(name)
        if entry is None:
            return None

        def through() -> bool:
            waits = entry.withdrawn and not entry.attached and entry.state != WAITING
            return not waits or self.state.over or (entry.ended and entry.row_written)

        return None if await self.state.comes(entry, through) else NotYet(f"{name} ({entry.state})")

    async def status(self, passing: bool = False) -> SweepStatus:
        """The sweep as it stands, for the live view.

        passing: asked by someone who is not what the sweep lives for; it is no sign of life.
        """
        await self.ready
        if not passing:
            self.seen()
        return await self.overview.status(self.warnings)

    async def interrupt(self) -> None:
        """Ends the training: packs save what they have, trials hear of it and end.

        The roster stays until its driver, which now comes to its end, closes it.
        """
        await self.ready
        self.state.interrupted = True
        self.state.phase = "stopping"
        await self.dispatch.stop_packs()

    async def close(self, wait: bool = True) -> list[str]:
        """Ends everything the sweep has started, after the last lines are written.

        Without `wait` its packs are not waited for: for a Ray instance that ends anyway. Answers
        what there is to warn of when all is written.
        """
        await self.ready
        if self.state.closed:
            await self.gone.wait()
            return self.warnings
        async with self.state.remembering:
            self.state.closed = True
        self.state.phase = "closing"
        await self.dispatch.stop_packs(wait)
        await self.reports.close()
        if wait:
            await self.streams.write_caches()
        await self.streams.end()
        self.overview.write_record()
        await asyncio.to_thread((self.state.folder / ".ray").delete)
        self.gone.set()
        return self.warnings

    async def all_ended(self) -> None:
        """Every SAE has; a driver has its own words about that, `tune.run` has not."""
        if not self.driven:
            await self.overview.write_down(await self.overview.status(self.warnings))

    # --- packs ------------------------------------------------------------------------------

    async def plan(self, pack: str) -> PackPlan | NotYet:
        """What a pack's workers shall do."""
        await self.ready
        return await self.dispatch.plan(pack)

    async def report(self, pack: str, reports: list[Report], reader: ReaderGauges | None) -> Answer:
        """News of some of a pack's SAEs. Reporting twice is harmless."""
        await self.ready
        state = self.state.packs.get(pack)
        if state is None:  # launched by a former incarnation, and given up by it
            return Answer(self.state.incarnation, [r.name for r in reports], {})
        if state.through:  # its processes were killed, and this one will hear of it
            raise SaerayError(f"{pack} was given up")
        state.reader = reader or state.reader
        if not self.state.over:
            self.state.trains()
        for r in reports:
            self.reports.take(state, r)
        return self.reports.answer(state)

    async def settled(self, pack: str, upto: dict[str, int] | None = None) -> Answer | NotYet:
        """An answer once nothing of the pack (upto: of these SAEs, to these steps) is pending."""
        await self.ready
        state = self.state.packs.get(pack)
        if state is None:
            return Answer(self.state.incarnation, [], {})
        return await self.reports.settled(state, upto) or self.reports.answer(state)

    async def decided(self, pack: str) -> Answer:
        """An answer once Tune has decided on all that the pack has reported, or soon."""
        await self.ready
        state = self.state.packs.get(pack)
        nothing = Answer(self.state.incarnation, [], {})
        return nothing if state is None else await self.reports.decided(state)

    async def broken(self, pack: str, problem: str) -> None:
        """A pack says why it can't go on; starting it again would not help."""
        await self.ready
        if pack in self.state.packs:
            self.state.packs[pack].problem = problem

    async def warn(self, text: str) -> None:
        """For the live view and `saeray status`; said once."""
        await self.state.warn(text)

    # --- gathering --------------------------------------------------------------------------

    def start_gathering(self) -> None:
        self.last_enlisted = time.monotonic()
        if self.gathering is None or self.gathering.done():
            self.gathering = self.state.do(self.gather())

    async def gather(self) -> None:
        """Waits until no trial has come for GATHER_SECONDS, then launches those that are there."""
        launched = None
        while launched != self.last_enlisted:  # others may come while these are launched
            while time.monotonic() - self.last_enlisted < GATHER_SECONDS:
                await asyncio.sleep(0.2)
            launched = self.last_enlisted
            await self.dispatch.launch(
                [e for e in self.state.entries.values() if e.state == WAITING]
            )

    # --- housekeeping -----------------------------------------------------------------------

    def add(
        self, name: str, config: LanguageModelSAERunnerConfig, known: Known | None = None
    ) -> Entry:
        others = [SAE(e.name, e.config) for e in self.state.entries.values()]
        refuse_duplicates([*others, SAE(name, config)])
        entry = self.state.entries[name] = Entry(name, config)
        if known is not None:
            entry.state, entry.path, entry.error = known.state, known.path, known.error
            entry.step, entry.n_training_tokens = known.step, known.n_training_tokens
            entry.metrics, entry.settled = known.metrics, known.step
            entry.row_written, entry.ended_at = entry.ended, entry.step if entry.ended else -1
            self.reports.evaluation_tokens += known.evaluation_tokens
        if not entry.ended:
            self.reports.open(entry)
            for text in [*cautions(config), *(lacking() if config.log_to_wandb else [])]:
                self.state.do(self.state.warn(text))
        return entry

    def take_up_again(self, entry: Entry) -> None:
        """A stopped or interrupted SAE waits for a pack again."""
        entry.state, entry.withdrawn, entry.error, entry.path = WAITING, False, None, None
        entry.row_written = False
        self.reports.open(entry)

    async def recall(self) -> None:
        """What a roster that was started again must know: its SAEs, streams and packs."""
        if not ray.get_runtime_context().was_current_actor_reconstructed:
            return
        self.driven = True  # for all it knows
        memory = await asyncio.to_thread(self.state.files.recall)
        if memory is None:
            return
        self.state.provenance, self.state.warnings = memory.versions, memory.warnings
        self.state.tokens = {name: (n, cached) for name, (n, cached) in memory.tokens.items()}
        known = await asyncio.to_thread(self.state.files.known, list(memory.saes))
        for name, config in memory.saes.items():
            self.add(name, LanguageModelSAERunnerConfig.from_dict(config), known[name])
        await self.state.read_earlier()
        self.state.phase = "training"
        await self.dispatch.take_over()
        await self.state.warn("the roster died and was started again.")
        if any(e.state == WAITING for e in self.state.entries.values()):
            self.start_gathering()

    @property
    def warnings(self) -> list[str]:
        return [*self.state.warnings, *self.reports.tracker.warnings]

    def seen(self) -> None:
        self.last_seen = time.monotonic()

    async def watch(self) -> None:
        """Ends the sweep when it is over or its driver and trials are gone."""
        await self.ready
        while not self.state.closed:
            if self.state.entries and time.monotonic() - self.overview.recorded > RENEW_SECONDS:
                self.overview.write_record()
                await self.streams.renew()
            await asyncio.sleep(POLL_SECONDS)
            if self.gathering is None or self.gathering.done():
                await self.dispatch.start_idlers()
            quiet = time.monotonic() - self.last_seen
            over = all(e.ended and not e.attached for e in self.state.entries.values())
            if quiet > LEASE_SECONDS or (over and not self.driven and quiet > OVER_SECONDS):
                status = await self.overview.status(self.warnings)
                await self.close()
                await self.overview.write_down(status)
        # Detached, so nobody else would end it. An actor that is exiting takes no more calls, and
        # packs that are closing still make some.
        await self.gone.wait()
        await asyncio.sleep(1.0)
        ray.actor.exit_actor()
