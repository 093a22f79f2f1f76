"""Waits with a limit that name who is late, and Ray's exceptions turned back into ours.

A part that died and is being started again is waited for like one that is slow: every call here is
harmless to repeat. One that is gone for good is not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayTaskError,
)

from saeray.errors import Late, SaerayError

POLL_SECONDS = 2.0  # a call never waits longer than this for news; callers ask again
RETRY_SECONDS = 0.2  # between calls to an actor that is being started again
RESTART_SECONDS = 300.0  # that one may take to be there again


class NotYet(NamedTuple):
    """The answer of a call that waited a little and shall be repeated."""

    late: str  # who is waited for, in words
    let_go: bool = False  # the caller shall give up what it still has for this
    progress: int = 0  # another number than before: who is late is slow, but gets on


def get(ref: Any, limit_s: float, who: str) -> Any:
    """`ray.get` with a limit; an error of ours raised over there is raised here as it was.

    Raises:
        Late: nothing came within `limit_s`.
        SaerayError: what the other side raised on purpose.
    """
    try:
        return ray.get(ref, timeout=limit_s)
    except GetTimeoutError:
        raise Late(
            f"{who} did not answer within {limit_s:g} s (wait_limit_s); raise it if the machine is "
            "only slow."
        ) from None
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, SaerayError):
            raise cause from None
        raise


def ask(call: Callable[[], Any], limit_s: float, who: str) -> Any:
    """`get` of a call that is repeated when its actor dies under it and is started again.

    Raises:
        Late: no answer within `limit_s`, restarts included.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return get(call(), max(0.1, deadline - time.monotonic()), who)
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise Late(
                    f"{who} died and was not started again within {limit_s:g} s (wait_limit_s)."
                ) from None
            time.sleep(RETRY_SECONDS)


def poll(
    call: Callable[[], Any],
    limit_s: float,
    who: str,
    not_yet: Callable[[NotYet], None] = lambda _: None,
) -> Any:
    """Repeats a call that answers `NotYet` until it answers; `limit_s` at most without progress.

    not_yet: is told of every such answer.

    Raises:
        Late: it was "not yet" for the whole time; names who its last answer was waiting for.
    """
    deadline, progress = time.monotonic() + limit_s, 0
    while True:
        answer = ask(call, limit_s, who)
        if not isinstance(answer, NotYet):
            return answer
        not_yet(answer)
        if answer.progress != progress:
            deadline, progress = time.monotonic() + limit_s, answer.progress
        if time.monotonic() > deadline:
            raise Late(
                f"nothing came from {answer.late} for {limit_s:g} s (wait_limit_s); raise it if "
                "the machine is only slow."
            )


async def steadily(call: Callable[[], Any], limit_s: float = RESTART_SECONDS) -> Any:
    """A call, in an async actor, that is repeated while its actor is being started again.

    Raises:
        ActorUnavailableError: that takes longer than `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return await call()
        except ActorUnavailableError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(RETRY_SECONDS)


def one_that_takes(
    call: Callable[[Any], Any],
    make: Callable[[], Any],
    limit_s: float,
    who: str,
    past: Callable[[Any], None] = lambda _: None,
) -> tuple[Any, Any]:
    """A named actor, found or made, that takes a call; and what it answered.

    One of an earlier session may just be ending: it answers None, or is gone under the call. It is
    waited for, and then another one made.

    past: is given one that has answered None.

    Raises:
        Late: the earlier one did not end within `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        actor = make()
        try:
            answer = ask(partial(call, actor), limit_s, who)
            if answer is not None:
                return actor, answer
            past(actor)
        except RayActorError:
            pass  # it has just gone
        time.sleep(RETRY_SECONDS)
    raise Late(f"{who} of an earlier session did not end within {limit_s:g} s (wait_limit_s).")
