"""The names of a sweep's actors: how they are made, and what can be read in them.

A roster's is `roster:<sweep>:<digest>`, a launcher's `<roster>/<pack>`, and those of a stream's
actors are `<stream>/<role>` (`stream.launch`), where a sweep's own stream is `<roster>/<stream>`.
"""

from __future__ import annotations

import ray

from saeray.spec.config import digest

ROSTER = "roster:"


def roster_name(sweep: str, folder: str) -> str:
    """Sweeps of one name in different folders are different sweeps."""
    return f"{ROSTER}{sweep}:{digest(folder, 6)}"


def drivers_name(roster: str) -> str:
    """The name of the actor that drives the sweep of a roster, where one does."""
    return roster.replace(ROSTER, "driver:")


def tags_of(actor_name: str) -> dict[str, str]:
    """Tags of an actor of a stream, by its name (`stream.launch`): sweep, stream, harvester.

    The sweep of a stream that several share is "", since it is no sweep's own. None of others.
    """
    stream, _, role = actor_name.rpartition("/")
    if not stream:
        return {}
    roster, _, own = stream.rpartition("/")
    tags = {"sweep": sweep_of(roster), "stream": own}
    number = role.rpartition("-")[2]
    return tags | ({"harvester": number} if role.startswith("harvester-") else {})


def sweep_of(roster: str) -> str:
    """The sweep's name in that of its roster."""
    return roster.removeprefix(ROSTER).rpartition(":")[0]


def in_words(actor_name: str) -> str:
    """What an actor is called in Ray's dashboard and logs: `mine: harvester-0`."""
    parts = actor_name.split("/")
    if not parts[0].startswith(ROSTER):
        return actor_name
    return f"{sweep_of(parts[0])}: {parts[-1] if len(parts) > 1 else 'roster'}"


def own_name() -> str:
    """The name of the actor that this process is; "" where it is none or has none."""
    if not ray.is_initialized():
        return ""
    return ray.get_runtime_context().get_actor_name() or ""
