"""From the reports of packs to results: evaluated, written down, and only then settled.

What is settled survives the process that reported it; everything else it keeps, to tell it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ray.exceptions import ObjectLostError

from saeray.actors.waiting import POLL_SECONDS, NotYet
from saeray.cluster.sweep_state import Entry, PackState, SweepState
from saeray.errors import SaerayError
from saeray.files.features import FILE as FEATURES
from saeray.files.tracking import Tracker
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.memory import SAES_AT_HARVESTER
from saeray.spec.messages import (
    DONE,
    ENDS,
    EVALUATING,
    FAILED,
    FINAL_METRICS,
    INTERRUPTED,
    STOPPED,
    TRAINING,
    Answer,
    Report,
    Result,
)
from saeray.spec.metric_names import EVALUATED, held_out
from saeray.spec.plan import DTYPE_BYTES
from saeray.stream.launch import Stream

EVALUATED_TOGETHER = 8  # SAEs: they share a harvester's forward of the model without any
TARGET_WITHIN = 0.05  # of target_l0: nothing is said


class Wanted(NamedTuple):
    """An evaluation that waits for others of the same report, to be made with them."""

    entry: Entry
    snapshot: Any  # reference
    found: asyncio.Future[dict[str, Any]]


class Reports:
    """Reports in, results out, each SAE's in their order."""

    def __init__(self, state: SweepState) -> None:
        self.state = state
        self.tracker = Tracker(state.folder)
        self.tracking = ThreadPoolExecutor(1, "tracking")
        self.evaluation_tokens = 0
        # By pack, hook points and whether it is their SAEs' last one.
        self.wanted: dict[tuple[str, tuple[str, ...], bool], list[Wanted]] = {}
        # Those that have ended, and at which step, and have no row yet.
        self.unwritten: list[tuple[Entry, int]] = []
        self.writing: asyncio.Task[None] | None = None
        # What is done once every SAE has ended, before anyone hears of the last one.
        self.all_ended: Callable[[], Awaitable[None]] | None = None

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
            evaluation = self.want(pack, entry, report.snapshot[0], report.state in ENDS)
        entry.pending.append((report, evaluation))
        if entry.settling is None or entry.settling.done():
            entry.settling = self.state.do(self.settle(entry))

    def want(
        self, pack: PackState, entry: Entry, snapshot: Any, final: bool
    ) -> asyncio.Future[dict[str, Any]]:
        """Metrics of a snapshot on the held-out windows, once they are there.

        SAEs that a pack reports at once are evaluated together, as far as memory allows; what is
        found of one depends on no other. If the pack dies, the weights of all of them are lost.
        """
        assert pack.stream is not None
        key = (pack.about.name, entry.config.hooks_read, final)
        others = self.wanted.setdefault(key, [])
        if not others:
            self.state.do(self.evaluate_wanted(key, pack.stream))  # runs when all are taken
        found = asyncio.get_running_loop().create_future()
        others.append(Wanted(entry, snapshot, found))
        return found

    async def evaluate_wanted(self, key: tuple[str, tuple[str, ...], bool], stream: Stream) -> None:
        wanted, (_, hooks, final) = self.wanted.pop(key), key
        size = together([w.entry.config for w in wanted], stream)
        groups = [wanted[i : i + size] for i in range(0, len(wanted), size)]
        await asyncio.gather(*(self.evaluate(stream, hooks, final, g) for g in groups))

    async def evaluate(
        self, stream: Stream, hooks: tuple[str, ...], final: bool, wanted: Sequence[Wanted]
    ) -> None:
        """Some SAEs on one harvester; what is in the way of one of them keeps no other one back."""
        try:
            if stream.held_out is None:
                stream.held_out = stream.token_server.held_out.remote()
            harvester = stream.harvesters[stream.ready[stream.evaluations % len(stream.ready)]]
            stream.evaluations += 1
            snapshots = [w.snapshot for w in wanted]
            found = await harvester.evaluate.remote(hooks, stream.held_out, final, *snapshots)
            for w, metrics in zip(wanted, found, strict=True):
                w.found.set_result(await self.kept(w.entry, dict(metrics)))
        except Exception as error:
            left = [w for w in wanted if not w.found.done()]
            if len(wanted) > 1 and not is_lost(error):
                for w in left:
                    await self.evaluate(stream, hooks, final, [w])
                return
            for w in left:
                w.found.set_exception(error)

    async def kept(self, entry: Entry, metrics: dict[str, Any]) -> dict[str, Any]:
        """What goes into logs and results of an evaluation; the rest is said and written here."""
        for warning in metrics.pop("warnings", ()):
            await self.state.warn(warning)
        features = metrics.pop("features", None)
        if features is not None:  # before its SAE has ended for anyone
            folder = self.state.folder / "trials" / entry.name
            try:
                await asyncio.to_thread(folder.write, FEATURES, features)
            except Exception as problem:
                self.state.say(f"{entry.name}: {FEATURES} could not be written: {problem}")
        self.evaluation_tokens += metrics[EVALUATED]
        return held_out(metrics)

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
            if state == INTERRUPTED and entry.config.evaluates_at(report.step):
                line = {k: v for k, v in metrics.items() if k not in FINAL_METRICS}
            elif state == INTERRUPTED:
                line = report.metrics if entry.config.logs_at(report.step) else None
            elif state == TRAINING and not entry.config.evaluates_at(report.step):
                line = report.metrics  # evaluated for who decides on it, not for the log
            if line is None:
                written = self.track(self.tracker.flush, entry.name)
            else:
                written = self.track(self.tracker.log, entry.name, report.step, line, state in ENDS)
            if state in ENDS:
                if state == DONE and (text := missed_target(entry, metrics)):
                    await self.state.warn(text)
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
            {e.name: e.ended_at for e in entries},
            [e.name for e in entries if wants_evaluation(e)],
            [e.name for e in entries if e.held],
            [e.name for e in entries if e.undecided],
        )

    async def decided(self, pack: PackState) -> Answer:
        """An answer once Tune has seen the newest result of all of a pack's trials, or soon."""
        deadline = time.monotonic() + POLL_SECONDS
        while (answer := self.answer(pack)).undecided and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        return answer

    def end(self, entry: Entry, state: str, error: str | None) -> None:
        """An SAE's end: its row is written before its trial or its pack hears of it."""
        entry.state, entry.error, entry.row_written = state, error, False
        self.track(self.tracker.finish, entry.name, state == FAILED)
        self.unwritten.append((entry, entry.step))
        if self.writing is None or self.writing.done():
            self.writing = self.state.do(self.write_rows())

    async def write_rows(self) -> None:
        """All rows at once, and again for those that have ended meanwhile: in a large sweep the
        table (and the picture, at its end) takes longer than one SAE after the other."""
        while self.unwritten:
            entries, self.unwritten = self.unwritten, []
            try:
                outcomes = self.state.outcomes()
                await asyncio.to_thread(self.state.files.write_results, outcomes)
                if self.all_ended is not None and all(o.state in ENDS for o in outcomes):
                    await self.all_ended()
            except Exception as problem:
                self.state.say(f"results could not be written: {problem}")
            for entry, step in entries:
                entry.ended_at = step
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
        folder = self.state.folder / "trials" / entry.name
        return Result(
            entry.number,
            entry.n_training_tokens,
            entry.step,
            {k: v for k, v in entry.metrics.items() if isinstance(v, (int, float))},
            entry.state,
            entry.error,
            # Where it will be, however it is stopped.
            entry.path if entry.ended else (folder / "final").uri,
            folder.uri,
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


def together(configs: Sequence[LanguageModelSAERunnerConfig], stream: Stream) -> int:
    """How many of these SAEs a harvester evaluates at once: all harvesters shall have some."""

    def n_bytes(c: LanguageModelSAERunnerConfig) -> int:
        read, written = (stream.about.widths[c.hooks_read[i]] for i in (0, -1))
        return (read + written) * c.d_sae(read) * DTYPE_BYTES[c.dtype]

    share = -(-len(configs) // len(stream.ready))
    return max(1, min(share, EVALUATED_TOGETHER, SAES_AT_HARVESTER // max(map(n_bytes, configs))))


def wants_evaluation(entry: Entry) -> bool:
    """Whether its next report shall be evaluated, since results without one can't be decided on."""
    if not entry.decided_upon or entry.evaluated or entry.ended:
        return False
    return not any(evaluation is not None for _, evaluation in entry.pending)


def missed_target(entry: Entry, metrics: Mapping[str, Any]) -> str | None:
    """What to say of an SAE that was steered to an L0 and has another one on held-out text."""
    target, l0 = entry.config.target_l0, metrics.get("eval/l0")
    if not target or entry.config.k is not None or not l0 or "eval/n_tokens" not in metrics:
        return None
    off = l0 / target - 1
    if abs(off) <= TARGET_WITHIN:
        return None
    return (
        f"{entry.name}: held-out L0 is {l0:.4g}, {abs(off):.0%} {'above' if off > 0 else 'below'} "
        f"target_l0 = {target:g}; more training steps come nearer."
    )


def publish(entry: Entry) -> None:
    """Wakes who waits for news of an SAE."""
    entry.news.set()
    entry.news = asyncio.Event()


def is_lost(error: BaseException) -> bool:
    """Whether an evaluation failed because the weights went with the process that owned them."""
    return isinstance(error, ObjectLostError) or isinstance(
        getattr(error, "cause", None), ObjectLostError
    )
