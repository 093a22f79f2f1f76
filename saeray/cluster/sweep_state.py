"""A running sweep as it stands: its SAEs, its packs, and what has been said of it.

The roster's own file (`roster.py`) speaks with trials and drivers, `dispatch.py` gets packs running
and `streams.py` what they read, `reports.py` turns packs' reports into results. This is what they
share. An SAE's life:

    waiting ──pack launched──► training ──last step──► evaluating ──► done
                                  │── withdrawn ──► stopped      └── NaN ──► failed
                                  └── sweep or pack ended ──► interrupted ──resumed──► waiting
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import ray

from saeray.actors.head_folder import MARKER
from saeray.actors.waiting import POLL_SECONDS
from saeray.cluster.launcher import AboutPack
from saeray.errors import SaerayError
from saeray.files.storage import Folder
from saeray.files.sweep_folder import Known, Memory, Outcome, SweepFolder
from saeray.spec.config import LanguageModelSAERunnerConfig, digest, stream_key
from saeray.spec.fitted import Fitted
from saeray.spec.messages import (
    DONE,
    ENDS,
    EVALUATING,
    WAITING,
    ReaderGauges,
    Report,
    SAERow,
    reader_name,
)
from saeray.spec.metric_names import EVALUATED
from saeray.stream.launch import Stream
from saeray.version import __version__


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
    pending: deque[tuple[Report, asyncio.Future[Any] | None]] = field(default_factory=deque)
    settling: asyncio.Task[None] | None = None
    settled: int = 0  # step up to which its reports are evaluated and written
    row_written: bool = False  # of its end: only then anyone hears of it
    ended_at: int = -1  # step of an end of which there was a row, also when it goes on
    decided_upon: bool = False  # by a scheduler or searcher, which may want any held-out figure
    held: bool = False  # its trial is a bare one: it stops where Tune has stopped that
    heard: int = 0  # number of the newest result after which its trial wanted another one
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @cached_property
    def stream_key(self) -> str:
        return stream_key(self.config)

    @property
    def ended(self) -> bool:
        return self.state in ENDS

    @property
    def evaluated(self) -> bool:
        """Whether its metrics have held-out figures."""
        return EVALUATED in self.metrics

    @property
    def to_be_told(self) -> bool:
        """Whether its newest result is whole: settled at its end, with all that is decided upon."""
        if self.state == EVALUATING or self.ended:
            return self.row_written
        if self.held and self.pending:  # what Tune sees of a step is what is logged of it
            return False
        return self.evaluated or not self.decided_upon

    @property
    def undecided(self) -> bool:
        """Whether Tune may yet stop it where it was at its last report."""
        waits = self.held and self.attached and not self.withdrawn and not self.ended
        return waits and self.heard < self.number

    @property
    def number(self) -> int:
        """Of its newest result: counts up, and is the same after the roster was started again."""
        return 2 * self.step + self.ended

    @property
    def row(self) -> SAERow:
        return SAERow(
            self.name,
            self.state,
            self.step,
            self.config.steps,
            self.n_training_tokens,
            self.metrics,
            self.error,
        )


@dataclass
class PackState:
    """A launched pack."""

    about: AboutPack
    launcher: Any = None
    task: Any = None  # that follows it to its end
    stream: Stream | None = None  # once it is there
    admitted: bool = False  # to its stream: there is memory for its SAEs
    nothing_to_do: bool = False  # its stream did not come about, or has no room for it yet
    reader: ReaderGauges | None = None
    announced: bool = False  # to its buffer, which keeps what it will begin with
    heard_of: bool = False  # its trainer is up and has asked for the plan
    problem: str | None = None  # why it can't go on, in its own words
    through: bool = False  # ended, or given up: what may be left of it is not listened to
    first_tokens: int = 0  # the least of its SAEs' newest checkpoints when it was launched

    @property
    def members(self) -> list[str]:
        return list(self.about.configs)

    @property
    def readers(self) -> list[str]:
        ranks = range(self.about.fitted.num_workers)
        return [reader_name(self.about.name, rank) for rank in ranks]


class SweepState:
    """What the parts of a roster share; all of them run on its event loop."""

    def __init__(self, sweep: str, folder: str, name: str) -> None:
        self.sweep = sweep
        self.folder = Folder.at(folder)
        self.files = SweepFolder(self.folder, sweep)
        self.name = name  # the roster's
        self.incarnation = uuid.uuid4().hex
        # Tells this disk from others; of the sweep, not of this incarnation.
        self.marker = digest([name, str(ray.get_runtime_context().get_node_id())])
        self.entries: dict[str, Entry] = {}
        self.earlier: dict[str, Outcome] = {}  # SAEs that only earlier sessions in the folder had
        self.packs: dict[str, PackState] = {}
        self.phase = "gathering trials"
        self.error: BaseException | None = None  # why the whole sweep can't go on
        self.warnings: list[str] = []
        self.provenance: dict[str, Any] = {"saeray": __version__, "ray": ray.__version__}
        # LM tokens harvested and read from cache by each incarnation of a buffer.
        self.tokens: dict[str, tuple[int, int]] = {}
        self.resampling_tokens: dict[str, int] = {}  # by the same, of the roster's own life
        self.training_since: float | None = None
        self.training_until: float | None = None
        self.milestones: dict[str, float] = {"roster": time.time()}
        self.interrupted = False  # nothing more is to be trained
        self.closed = False  # closing, or closed
        self.remembering = asyncio.Lock()
        self.tasks: set[asyncio.Task[Any]] = set()

    @property
    def over(self) -> bool:
        """Whether nothing more is to be trained."""
        return self.closed or self.interrupted

    def outcomes(self) -> list[Outcome]:
        """Of every SAE of the sweep's folder, as it stands."""
        now = {
            e.name: Outcome(e.name, e.config, e.state, e.path, e.metrics, e.error)
            for e in self.entries.values()
        }
        return list((self.earlier | now).values())

    async def read_earlier(self) -> None:
        """Learns of SAEs that are in the folder's files and not in this session."""
        self.earlier = await asyncio.to_thread(self.files.outcomes_but, set(self.entries))

    async def done_before(self, name: str) -> Known | None:
        """What an earlier session in the folder has of an SAE that it has trained to its end."""
        outcome = self.earlier.get(name)
        if outcome is None or outcome.state != DONE:
            return None
        return (await asyncio.to_thread(self.files.known, [name]))[name]

    async def comes(self, entry: Entry, news: Callable[[], bool]) -> bool:
        """Whether what is waited for of an SAE is so within POLL_SECONDS."""
        deadline = time.monotonic() + POLL_SECONDS
        while not news():
            self.raise_error()
            try:
                await asyncio.wait_for(entry.news.wait(), max(0.0, deadline - time.monotonic()))
            except (TimeoutError, asyncio.TimeoutError):
                return news()
        return True

    def raise_error(self) -> None:
        if self.error is not None:
            kind = type(self.error) if isinstance(self.error, SaerayError) else SaerayError
            raise kind(str(self.error))

    def trains(self) -> None:
        """A pack has reported."""
        self.phase, self.training_until = "training", time.time()
        if self.training_since is None:
            self.training_since = self.training_until

    def reached(self, milestone: str) -> None:
        """Notes when something of the start was there first."""
        self.milestones.setdefault(milestone, time.time())

    def do(self, work: Any) -> asyncio.Task[Any]:
        """Work in the background; asyncio itself keeps no hold on it."""
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def say(self, text: str) -> bool:
        """Adds a warning to the status; whether it is a new one."""
        if text in self.warnings:
            return False
        self.warnings.append(text)
        return True

    async def warn(self, text: str) -> None:
        """`say`, which a roster that is started again remembers."""
        if self.say(text):
            await self.remember()

    async def remember(self) -> None:
        """Writes down what a new incarnation needs, and what tells others which disk this is."""
        async with self.remembering:
            if self.closed:
                return
            configs = {e.name: e.config.to_dict() for e in self.entries.values()}
            memory = Memory(configs, self.provenance, list(self.warnings), dict(self.tokens))
            await asyncio.to_thread(self.files.remember, memory)
            if self.folder.is_local:
                await asyncio.to_thread((self.folder / ".ray").write, MARKER, self.marker.encode())

    async def write_sweep_yaml(self, fitted: Fitted) -> None:
        """The resolved configs, and what they run with."""
        configs = {o.name: o.config for o in self.outcomes()}
        await asyncio.to_thread(
            self.files.write_sweep_yaml, configs, self.provenance, fitted.as_data()
        )
