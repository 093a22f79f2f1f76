"""From the reports of packs to results: evaluated, written down, and only then settled.

What is settled survives the process that reported it; everything else it keeps, to tell it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray.exceptions import ObjectLostError

from saeray.actors.waiting import POLL_SECONDS, NotYet
from saeray.cluster.sweep_state import Entry, PackState, SweepState
from saeray.errors import SaerayError
from saeray.files.tracking import Tracker
from saeray.spec.messages import (
    DONE,
    ENDS,
    EVALUATING,
    FAILED,
    INTERRUPTED,
    STOPPED,
    Answer,
    Report,
    Result,
)
from saeray.stream.launch import Stream


class Reports:
    """Reports in, results out, each SAE's in their order."""

    def __init__(self, state: SweepState) -> None:
        self.state = state
        self.tracker = Tracker(state.folder)
        self.tracking = ThreadPoolExecutor(1, "tracking")
        self.evaluation_tokens = 0
        self.unwritten: list[Entry] = []  # that have ended, and have no row yet
        self.writing: asyncio.Task[None] | None = None

    def open(self, entry: Entry) -> None:
        """Before the first report of an SAE, or of one that is taken up again."""
        self.track(self.tracker.open, entry.name, entry.config)

    def take(self, pack: PackState, report: Report) -> None:
        """One report. Taking it twice is harmless."""
        entry = self.state.entries[report.name]
        if entry.ended:
            return
        entry.step, entry.n_training_tokens = report.step, report.n_training_tokens
        if report.state in (DONE, STOPPED):
            entry.state = EVALUATING
        evaluation = None
        if report.snapshot is not None:
            assert pack.stream is not None
            evaluation = self.state.do(self.evaluate(entry, pack.stream, report.snapshot[0]))
        entry.pending.append((report, evaluation))
        if entry.settling is None or entry.settling.done():
            entry.settling = self.state.do(self.settle(entry))

    async def evaluate(self, entry: Entry, stream: Stream, snapshot: Any) -> dict[str, Any]:
        """Metrics of a snapshot on the held-out windows."""
        if stream.held_out is None:
            stream.held_out = stream.token_server.held_out.remote()
        harvester = stream.harvesters[stream.ready[stream.evaluations % len(stream.ready)]]
        stream.evaluations += 1
        metrics = dict(
            await harvester.evaluate.remote(
                snapshot, entry.config.resolved_hook_point, stream.held_out
            )
        )
        for warning in metrics.pop("warnings", ()):
            await self.state.warn(warning)
        self.evaluation_tokens += metrics["eval/n_tokens"]
        return metrics

    async def settle(self, entry: Entry) -> None:
        """Passes on an SAE's reports as their evaluations come in."""
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
                    await self.state.warn(f"{entry.name}: not evaluated: {error}")
            state = report.state
            if state == STOPPED and self.state.over:
                state = INTERRUPTED
            entry.metrics, entry.path = {**entry.metrics, **metrics}, report.path
            # Once this run has gone on, its log shall be that of an uninterrupted one.
            line: dict[str, Any] | None = metrics
            if state == INTERRUPTED and not entry.config.evaluates_at(report.step):
                line = report.metrics if entry.config.logs_at(report.step) else None
            if line is None:
                written = self.track(self.tracker.flush, entry.name)
            else:
                written = self.track(self.tracker.log, entry.name, report.step, line, state in ENDS)
            if state in ENDS:
                await asyncio.wrap_future(written)
                self.end(entry, state, report.error)
                await self.rows_written()
            else:
                self.state.do(self.note_settled(entry, written))
                publish(entry)
            entry.pending.popleft()

    async def note_settled(self, entry: Entry, written: Any) -> None:
        entry.settled = max(entry.settled, await asyncio.wrap_future(written) or 0)

    async def settled(
        self, pack: PackState, upto: Mapping[str, int] | None = None
    ) -> NotYet | None:
        """Returns None once nothing of the pack waits for its evaluation any more.

        upto: no report of these SAEs up to these steps; later ones may.
        """
        entries = [self.state.entries[n] for n in (pack.members if upto is None else upto)]

        def waits(e: Entry) -> bool:
            return bool(e.pending) and (upto is None or e.pending[0][0].step <= upto[e.name])

        deadline = time.monotonic() + POLL_SECONDS
        while any(map(waits, entries)):
            if time.monotonic() > deadline:
                return NotYet("the harvesters (evaluation)")
            await asyncio.sleep(0.05)
        # A pack that waits reports nothing, and so nothing else would have its lines written.
        for e in entries:
            if not e.ended:
                await self.note_settled(e, self.track(self.tracker.flush, e.name))
        return None

    def answer(self, pack: PackState) -> Answer:
        entries = [self.state.entries[n] for n in pack.members]
        return Answer(
            self.state.incarnation,
            [e.name for e in entries if e.withdrawn],
            {e.name: e.config.steps if e.row_written else e.settled for e in entries},
        )

    def end(self, entry: Entry, state: str, error: str | None) -> None:
        """An SAE's end: its row is written before its trial or its pack hears of it."""
        entry.state, entry.error, entry.row_written = state, error, False
        self.track(self.tracker.finish, entry.name, state == FAILED)
        self.unwritten.append(entry)
        if self.writing is None or self.writing.done():
            self.writing = self.state.do(self.write_rows())

    async def write_rows(self) -> None:
        """All rows at once, and again for those that have ended meanwhile: in a large sweep the
        table (and the picture, at its end) takes longer than one SAE after the other."""
        while self.unwritten:
            entries, self.unwritten = self.unwritten, []
            try:
                await asyncio.to_thread(self.state.files.write_results, self.state.outcomes())
            except Exception as problem:
                self.state.say(f"results could not be written: {problem}")
            for entry in entries:
                entry.row_written = entry.ended  # it may have been taken up again
                publish(entry)

    async def rows_written(self) -> None:
        """Until every SAE that has ended has its row."""
        while self.writing is not None and not self.writing.done():
            await asyncio.shield(self.writing)

    def interrupt_rest(self, error: str) -> None:
        """Ends every SAE that has not ended."""
        for entry in self.state.entries.values():
            if not entry.ended:
                self.end(entry, INTERRUPTED, error)

    def give_up(self, error: BaseException) -> None:
        """The whole sweep can't go on."""
        cause = getattr(error, "cause", None)
        self.state.error = cause if isinstance(cause, SaerayError) else error
        self.state.phase = "failed"
        self.interrupt_rest(str(self.state.error))

    def result_of(self, entry: Entry) -> Result:
        return Result(
            entry.number,
            entry.n_training_tokens,
            entry.step,
            {k: v for k, v in entry.metrics.items() if isinstance(v, (int, float))},
            entry.state,
            entry.error,
            entry.path,
            (self.state.folder / "trials" / entry.name).uri,
        )

    def track(self, call: Any, *args: Any) -> Any:
        """Runs a call of the tracker in its own thread, in order; a future of its result."""

        def guarded() -> Any:
            try:
                return call(*args)
            except Exception as error:
                self.state.say(f"tracking: {type(error).__name__}: {error}")

        return self.tracking.submit(guarded)

    async def close(self) -> None:
        """After the last line and row."""
        await self.rows_written()
        await asyncio.get_running_loop().run_in_executor(self.tracking, self.tracker.close)


def publish(entry: Entry) -> None:
    """Wakes who waits for news of an SAE."""
    entry.news.set()
    entry.news = asyncio.Event()


def is_lost(error: BaseException) -> bool:
    """Whether an evaluation failed because the weights went with the process that owned them."""
    return isinstance(error, ObjectLostError) or isinstance(
        getattr(error, "cause", None), ObjectLostError
    )
