"""Plain classes made into actors: the only place that says how ours are started and outlive others.

A class stays undecorated, so it can be tested without a cluster; what it needs of a node is decided
where the actor is created.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from saeray.actors.nodes import namespace
from saeray.spec.room import Need

# What the user's own environment says to wandb and the hub. It travels to the actors that need it
# in their arguments: Ray writes a runtime_env, and with it every key, into its logs.
PASSED_ON = ("WANDB_", "HF_", "HUGGING_FACE_")


def passed_on() -> dict[str, str]:
    """The part of this process's environment that a sweep's actors are given."""
    return {k: v for k, v in os.environ.items() if k.startswith(PASSED_ON)}


def actor(cls: type, name: str, **options: Any) -> Any:
    """A class as an actor that belongs to no process and is started again when it dies."""
    standard = {
        "name": name,
        "namespace": namespace(),
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
        "scheduling_strategy": "DEFAULT",
    }
    return ray.remote(cls).options(**(standard | options))


def placed(need: Need) -> dict[str, Any]:
    """Options of an actor that needs this of its node."""
    custom = {k: v for k, v in need.resources.items() if k not in ("CPU", "GPU")}
    options: dict[str, Any] = {
        "num_cpus": need.resources.get("CPU", 0),
        "num_gpus": need.resources.get("GPU", 0),
    }
    if custom:
        options["resources"] = custom
    if need.labels:
        options["label_selector"] = dict(need.labels)
    return options


async def as_future(ref: Any) -> Any:
    return await ref
