"""HarvesterPool: which harvester has which block, and what follows when one dies or fails.

The activation buffer decides which block is wanted; here it is given to the harvester with the
least to do. One that died is left out until Ray has started it again, and so is one whose node is
about to be taken away: it is started again elsewhere before that.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError

from saeray.actors.environment import in_own_ray
from saeray.actors.make import has_ended
from saeray.actors.nodes import leaving_nodes
from saeray.actors.waiting import NotYet
from saeray.errors import SaerayError
from saeray.spec.messages import CacheKey
from saeray.stream.token_server import TokenBlock
from saeray.text.served import BlockStart

IN_FLIGHT = 2  # blocks under way per harvester: one running, one waiting at its door
DEATHS = 5  # of harvesters over one and the same block, after which the block is to blame
LOOK_AT_NODES_SECONDS = 2.0
FAILURES = 3  # of the forward pass on one block (out of memory, a GPU error)


class HarvesterPool:
    """The harvesters of one stream, on its buffer's event loop."""

    def __init__(
        self,
        token_server: Any,
        harvesters: list[Any],
        n_hook_points: int,
        cache: CacheKey | None,
        absent: Sequence[int],
        *,
        do: Callable[[Coroutine[Any, Any, None]], None],
        warn: Callable[[str], None],
        up_again: Callable[[], None],
    ) -> None:
        """token_server, harvesters: actors. absent: harvesters that wait for a node.

        do: runs work in the background. up_again: is called when a harvester is.
        """
        self.token_server = token_server
        self.harvesters = harvesters
        self.n_hook_points = n_hook_points
        self.cache = cache
        self.do, self.warn, self.up_again = do, warn, up_again
        self.in_flight = [0] * len(harvesters)
        self.down = set(absent)  # harvesters that are being started (again)
        self.deaths: Counter[int] = Counter()  # of harvesters, by the block they were at
        self.failures: Counter[int] = Counter()  # of the forward pass, by block
        self.under_way: dict[int, tuple[str, float]] = {}  # block -> who has it, since when
        self.text_progress = 0  # what the token server said last of its own
        self.places: dict[int, BlockStart] = {}  # by block: where it begins, of a few
        self.error: SaerayError | None = None  # why the stream can't go on
        self.harvested_tokens = 0
        self.cached_tokens = 0
        self.resampling_tokens = 0  # run to pick rows for dead features
        self.seconds = 0.0  # summed over harvesters
        self.started: float | None = None
        for at in absent:
            do(self.revive(at))

    @property
    def elapsed_seconds(self) -> float:
        """Since the first block was asked for."""
        return 0.0 if self.started is None else time.monotonic() - self.started

    @property
    def all_down(self) -> bool:
        return len(self.down) == len(self.harvesters)

    def least_busy(self) -> int | None:
        """The harvester with the least to do, of those that are up."""
        up = [i for i in range(len(self.harvesters)) if i not in self.down]
        return min(up, key=self.in_flight.__getitem__, default=None)

    def free(self) -> int | None:
        """The harvester with the least to do, if it may be given a block."""
        at = self.least_busy()
        if self.error is not None or at is None or self.in_flight[at] >= IN_FLIGHT:
            return None
        return at

    def taken(self, at: int) -> None:
        """A block will be asked of this harvester (`harvest` follows)."""
        if self.started is None:
            self.started = time.monotonic()
        self.in_flight[at] += 1

    async def harvest(self, block: int, at: int) -> list[Any] | None:
        """One block at one harvester: a reference per hook point, or None when that failed."""
        done, refs = None, []
        try:
            self.under_way[block] = ("the token server", time.monotonic())
            tokens = await self.tokens(block, partial(self.waits, block, time.monotonic()))
            self.under_way[block] = (f"harvester {at}", time.monotonic())
            meta, *refs = (
                self.harvesters[at]
                .harvest.options(num_returns=1 + self.n_hook_points, max_task_retries=0)
                .remote(block, tokens, self.cache)
            )
            done = await meta
        except RayActorError as error:
            self.harvester_died(block, at, error)
        except Exception as error:
            self.harvest_failed(block, at, error)
        finally:
            del self.under_way[block]
            self.in_flight[at] -= 1
        if done is None:
            return None
        self.harvested_tokens += done.n_tokens
        self.cached_tokens += done.cached_tokens
        self.seconds += done.seconds
        for text in done.warnings:
            self.warn(text)
        self.deaths.pop(block, None)
        self.failures.pop(block, None)
        return refs

    def waits(self, block: int, since: float, answer: NotYet) -> None:
        self.under_way[block] = (answer.late, since)
        self.text_progress = answer.progress

    async def tokens(self, block: int, not_yet: Callable[[NotYet], None]) -> Any:
        """The token windows of a block. Ray repeats the call when the server is started again.

        not_yet: is told while there is none.
        """
        near = [self.places[b] for b in self.places if b <= block][-1:]
        try:
            while isinstance(answer := await self.token_server.block.remote(block, *near), NotYet):
                not_yet(answer)
        except RayActorError as error:
            raise SaerayError(f"the token server is gone ({error})") from None
        if not isinstance(answer, TokenBlock):
            return answer
        self.places[block + 1] = answer.next_at
        self.places = dict(sorted(self.places.items()))
        return answer.tokens

    def harvester_died(self, block: int, at: int, error: RayActorError) -> None:
        self.deaths[block] += 1
        if self.deaths[block] >= DEATHS:
            self.broken(
                f"{self.deaths[block]} harvesters died over block {block}; out of memory? Lower "
                f"store_batch_size. The last one: {error}"
            )
        if at in self.down:
            return
        self.warn(f"harvester {at} died; its blocks are harvested elsewhere or again.")
        self.down.add(at)
        self.do(self.revive(at))

    async def revive(self, at: int, left: str = "") -> None:
        """Waits until Ray has started a harvester again; elsewhere than on the node it has left."""
        while True:
            try:
                if await self.node_of(at) != left:
                    break
            except ActorDiedError:
                if await asyncio.to_thread(has_ended, self.harvesters[at]):
                    if self.all_down:
                        self.broken("no harvester is left")
                    return
            except RayActorError:
                pass
            await asyncio.sleep(0.2)
        self.down.discard(at)
        self.up_again()

    async def node_of(self, at: int) -> str:
        return str(await self.harvesters[at].node.options(max_task_retries=0).remote())

    async def watch_nodes(self) -> None:
        """Gives no more blocks to harvesters whose node is about to be taken away."""
        while not in_own_ray():
            await asyncio.sleep(LOOK_AT_NODES_SECONDS)
            leaving = await asyncio.to_thread(leaving_nodes)
            up = [i for i in range(len(self.harvesters)) if i not in self.down]
            if not leaving or not up:
                continue
            nodes = await asyncio.gather(*map(self.node_of, up), return_exceptions=True)
            for at, node in zip(up, nodes, strict=True):
                if isinstance(node, str) and node in leaving and at not in self.down:
                    self.warn(f"harvester {at} leaves its node, which is about to be taken away.")
                    self.down.add(at)
                    self.do(self.move(at, node))

    async def move(self, at: int, node: str) -> None:
        """Ends a harvester when it has done what it was given; Ray starts it on another node."""
        while self.in_flight[at]:
            await asyncio.sleep(0.1)
        with suppress(RayError):  # it has died meanwhile
            ray.kill(self.harvesters[at], no_restart=False)
        await self.revive(at, node)

    def harvest_failed(self, block: int, at: int, error: Exception) -> None:
        cause = getattr(error, "cause", error)
        if isinstance(cause, SaerayError):
            self.error = cause  # on purpose, so it would be the same at any harvester
            return
        self.failures[block] += 1
        if self.failures[block] >= FAILURES:
            self.broken(f"block {block} failed {FAILURES} times: {cause}")
            return
        self.start_again(at, cause)

    def start_again(self, at: int, cause: BaseException) -> None:
        """A harvester that has failed: after a GPU error the process is of no use any more."""
        self.warn(f"harvester {at}: {type(cause).__name__}: {cause}; started again.")
        ray.kill(self.harvesters[at], no_restart=False)

    def broken(self, why: str) -> None:
        self.error = SaerayError(f"the activation stream broke off: {why}")
