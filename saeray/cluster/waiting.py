"""Waits with a limit that name who is late, and Ray's exceptions turned back into ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from saeray.errors import Late, SaerayError


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


def poll(ask: Callable[[], Any], limit_s: float, who: str) -> Any:
    """Repeats a call that answers None for "not yet" until it answers, for `limit_s` at most.

    Raises:
        Late: it was "not yet" for the whole time.
    """
    deadline = time.monotonic() + limit_s
    while True:
        answer = get(ask(), limit_s, who)
        if answer is not None:
            return answer
        if time.monotonic() > deadline:
            raise Late(
                f"nothing came from {who} for {limit_s:g} s (wait_limit_s); raise it if the "
                "machine is only slow."
            )
