"""RowRequests: rows that dead features may take the place of, picked by the harvesters.

A pack asks in the middle of its training, with its SAEs as they are after a step, and waits. What
is picked is a function of what it asks with, so asking again is harmless: a pack that was started
again asks for the same, and a harvester that dies leaves its LM batches to the others.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from saeray.actors.waiting import POLL_SECONDS, NotYet
from saeray.errors import SaerayError
from saeray.spec.messages import RowsWanted
from saeray.stream.harvester_pool import FAILURES, IN_FLIGHT, HarvesterPool

LOOK_SECONDS = 0.2  # between looks for a harvester that is up


class Request:
    """One request under way."""

    def __init__(self, wanted: RowsWanted, pool: HarvesterPool, snapshots: list[Any]) -> None:
        self.wanted = wanted
        self.pool = pool
        self.snapshots = snapshots
        self.late = "the harvesters"
        self.done = 0  # LM batches
        self.places = asyncio.Semaphore(IN_FLIGHT * len(pool.harvesters))
        self.rows = asyncio.ensure_future(self.all())

    async def all(self) -> list[Any]:
        """A reference for each LM batch."""
        each = [asyncio.ensure_future(self.of_block(b)) for b in self.wanted.blocks]
        try:
            return list(await asyncio.gather(*each))
        finally:
            for task in each:
                task.cancel()

    async def of_block(self, block: int) -> Any:
        """One LM batch, however many harvesters die over it."""
        async with self.places:
            tokens = await self.pool.tokens(block, self.text_is_late)
            while True:
                at = self.pool.least_busy()
                if at is None:
                    self.late = "the harvesters (all of them are being started again)"
                    await asyncio.sleep(LOOK_SECONDS)
                    continue
                try:
                    return await self.at_harvester(block, tokens, at)
                except RayActorError as error:
                    self.pool.harvester_died(block, at, error)
                    if self.pool.error is not None:
                        raise self.pool.error from None
                except RayTaskError as error:
                    if not isinstance(error.cause, (SaerayError, ObjectLostError)):
                        self.pool.start_again(at, error.cause)
                    raise

    async def at_harvester(self, block: int, tokens: Any, at: int) -> Any:
        self.pool.in_flight[at] += 1
        self.late = f"harvester {at}"
        try:
            n_tokens, rows = (
                self.pool.harvesters[at]
                .rows_for_dead.options(num_returns=2, max_task_retries=0)
                .remote(block, tokens, self.wanted.saes, *self.snapshots)
            )
            n = await n_tokens
        finally:
            self.pool.in_flight[at] -= 1
            self.pool.up_again()
        self.pool.resampling_tokens += n
        self.done += 1
        return rows

    def text_is_late(self, answer: NotYet) -> None:
        self.late = answer.late

    def not_yet(self) -> NotYet:
        n = len(self.wanted.blocks)
        late = f"{self.late} (rows for dead features, {self.done} of {n} LM batches)"
        return NotYet(late, progress=self.done)

    def cancel(self) -> None:
        self.rows.cancel()


class RowRequests:
    """The newest request of each pack, on the buffer's event loop."""

    def __init__(self, pool: HarvesterPool) -> None:
        self.pool = pool
        self.newest: dict[str, Request] = {}
        self.failures: dict[str, int] = {}  # of a pack's, one after another

    async def of(self, wanted: RowsWanted, snapshots: list[Any]) -> list[Any] | NotYet:
        """A reference of each LM batch's rows (`Harvester.rows_for_dead`); or ask again.

        snapshots: references of the SAEs, in the order of `wanted.saes`.

        Raises:
            SaerayError: it can't be had; says why.
        """
        request = self.newest.get(wanted.pack)
        if request is None or request.wanted != wanted:
            self.forget(wanted.pack)
            request = self.newest[wanted.pack] = Request(wanted, self.pool, snapshots)
        done, _ = await asyncio.wait([request.rows], timeout=POLL_SECONDS)
        if not done or request.rows.cancelled():
            return request.not_yet()
        error = request.rows.exception()
        if error is None:
            self.failures.pop(wanted.pack, None)
            return request.rows.result()
        self.forget(wanted.pack)
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, SaerayError):
            raise cause
        if not isinstance(cause, ObjectLostError):  # with a pack that died: this is another one
            self.failed(wanted, cause)
        return request.not_yet()

    def failed(self, wanted: RowsWanted, cause: BaseException) -> None:
        n = self.failures[wanted.pack] = self.failures.get(wanted.pack, 0) + 1
        if n >= FAILURES:
            raise SaerayError(f"picking rows for dead features failed {n} times: {cause}")

    def forget(self, pack: str) -> None:
        """What was answered may go."""
        request = self.newest.pop(pack, None)
        if request is not None:
            request.cancel()
