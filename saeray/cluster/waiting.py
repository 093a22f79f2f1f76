"""Waits with a limit that name who is late, and Ray's exceptions turned back into ours.

A part that died and is being started again is waited for like one that is slow: every call here is
harmless to repeat. One that is gone for good is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayTaskError

from saeray.errors import Late, SaerayError

POLL_SECONDS = 2.0  # a call never waits longer than this for news; callers ask again
RETRY_SECONDS = 0.2  # between calls to an actor that is being started again


class NotYet(NamedTuple):
    """The answer of a call that waited a little and shall be repeated."""

    late: str  # who is waited for, in words


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


def poll(call: Callable[[], Any], limit_s: float, who: str) -> Any:
    """Repeats a call that answers `NotYet` until it answers, for `limit_s` at most.

    Raises:
        Late: it was "not yet" for the whole time; names who its last answer was waiting for.
    """
    deadline = time.monotonic() + limit_s
    while True:
        answer = ask(call, limit_s, who)
        if not isinstance(answer, NotYet):
            return answer
        if time.monotonic() > deadline:
            raise Late(
                f"nothing came from {answer.late} for {limit_s:g} s (wait_limit_s); raise it if "
                "the machine is only slow."
            )
