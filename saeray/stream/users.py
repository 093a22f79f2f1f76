"""The sweeps that use a shared stream, which ends with the last of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

LEASE_SECONDS = 180.0  # without a sign of a sweep: it is gone


class Users:
    """Who uses a buffer, by the sweep's name, and which readers each of them has."""

    def __init__(self, give_up: Callable[[Iterable[str]], None], close: Callable[[], None]) -> None:
        """give_up: is told the readers of a sweep that is gone; close: ends the stream."""
        self.give_up = give_up
        self.close = close
        self.seen: dict[str, float] = {}  # when each was last heard of
        self.readers: dict[str, set[str]] = {}
        self.closing = False

    def reads(self, user: str, reader: str) -> None:
        self.readers.setdefault(user, set()).add(reader)

    def readers_of(self, user: str) -> set[str]:
        return self.readers.get(user, set())

    def join(self, user: str) -> bool:
        """Whether it may: not when the stream is just being closed. Also a sign of life."""
        if not self.closing:
            self.seen[user] = time.monotonic()
        return not self.closing

    def part(self, user: str) -> None:
        """One that has done with the stream; the last one to go closes it."""
        self.forget(user)
        if not self.seen:
            self.end()

    def forget(self, user: str) -> None:
        self.seen.pop(user, None)
        self.give_up(self.readers.pop(user, set()))

    def end(self) -> None:
        self.closing = True
        self.close()

    async def watch(self) -> None:
        """Forgets sweeps that are gone without a word, and closes when there is none left."""
        alone_since = time.monotonic()
        while not self.closing:
            await asyncio.sleep(LEASE_SECONDS / 10)
            now = time.monotonic()
            for user, seen in list(self.seen.items()):
                if now - seen > LEASE_SECONDS:
                    self.forget(user)
            if self.seen:
                alone_since = now
            elif now - alone_since > LEASE_SECONDS:
                self.end()
