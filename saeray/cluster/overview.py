"""A sweep as a whole, for who looks at it: `SweepStatus` from what the parts of a roster know."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from ray.exceptions import RayError

from saeray.actors.nodes import namespace
from saeray.actors.waiting import POLL_SECONDS
from saeray.cluster import registry
from saeray.cluster.cost import Times, write_down
from saeray.cluster.reports import Reports
from saeray.cluster.streams import Streams
from saeray.cluster.sweep_state import SweepState
from saeray.errors import ConfigError
from saeray.spec.messages import FAILED, Gauges, SweepStatus, rows_are


class Overview:
    """What the live view draws."""

    def __init__(self, state: SweepState, reports: Reports, streams: Streams) -> None:
        self.state = state
        self.reports = reports
        self.streams = streams
        self.token_counts: Any = None
        self.record = registry.Record(
            state.sweep, namespace(), state.name, state.folder.uri, time.time()
        )
        self.recorded = 0.0

    async def status(self, warnings: list[str]) -> SweepStatus:
        """The sweep as it stands."""
        now: list[Gauges] = []
        for stream in self.streams.running:
            gauges = await self.streams.look(stream)
            if gauges is None:
                continue
            now.append(gauges)
            try:
                self.token_counts = await asyncio.wait_for(
                    stream.token_server.counts.remote(), POLL_SECONDS
                )
            except (TimeoutError, asyncio.TimeoutError, RayError):
                continue  # busy or being started again; the next look will tell
        counts = self.token_counts
        passes: dict[str, int] = {}
        for e in self.state.entries.values():
            passes[e.stream_key] = max(passes.get(e.stream_key, 0), e.n_training_tokens)
        return SweepStatus(
            rows=[e.row for e in self.state.entries.values()],
            phase=self.state.phase,
            # What a buffer that died has harvested was harvested all the same.
            harvested_tokens=sum(harvested for harvested, _ in self.state.tokens.values()),
            cached_tokens=sum(cached for _, cached in self.state.tokens.values()),
            trained_tokens=sum(e.n_training_tokens for e in self.state.entries.values()),
            gauges=now,
            readers={n: p.reader for n, p in self.state.packs.items() if p.reader is not None},
            warnings=[*warnings, *(counts.warnings if counts else [])],
            error=None if self.state.error is None else str(self.state.error),
            bad_input=isinstance(self.state.error, ConfigError),
            epochs=counts.epochs if counts else 1,
            skipped_rows=counts.skipped_rows if counts else 0,
            evaluation_tokens=self.reports.evaluation_tokens,
            resampling_tokens=sum(self.state.resampling_tokens.values()),
            packs=[p.members for p in self.state.packs.values()],
            pass_tokens=list(passes.values()),
            rows_are=rows_are(e.config.model_name for e in self.state.entries.values()),
            training_since=self.state.training_since,
            training_until=self.state.training_until,
            milestones=self.state.milestones,
            placement=self.streams.placement,
        )

    async def write_down(self, status: SweepStatus) -> None:
        """The account and the page of a sweep that nobody drives."""
        times = Times(self.state.milestones["roster"], time.time())
        prevented = await asyncio.to_thread(write_down, self.state.folder, status, times)
        if prevented is not None:
            self.state.say(prevented)

    def write_record(self) -> None:
        """What `saeray status` shall say of this sweep."""
        entries, outcomes = self.state.entries.values(), self.state.outcomes()
        r = self.record
        r.states = dict(Counter(o.state for o in outcomes))
        r.n_steps = sum(e.step for e in entries)
        r.n_steps += sum(o.steps for o in outcomes if o.name not in self.state.entries)
        r.total_steps = sum(o.config.steps for o in outcomes)
        errors = [e.error for e in entries if e.error and e.state == FAILED]
        r.error = (
            str(self.state.error) if self.state.error is not None else next(iter(errors), None)
        )
        r.ended = time.time() if self.state.closed else None
        self.recorded = time.monotonic()
        registry.write(r)
