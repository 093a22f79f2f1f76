"""Plain classes made into actors: the only place that says how ours are started and outlive others.

A class stays undecorated, so it can be tested without a cluster; what it needs of a node is decided
where the actor is created.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Any

import ray

from saeray.actors.names import in_words
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
    return ray.remote(mortal(cls, in_words(name))).options(**(standard | options))


def mortal(cls: type, words: str) -> type:
    """A class whose actor ends at once when it is sent SIGTERM.

    words: what it is called in Ray's dashboard, and before its lines in Ray's logs.
    """

    class Mortal(cls):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            end_at_sigterm()
            super().__init__(*arguments, **named)

        def __repr__(self) -> str:
            return words

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Mortal, name, getattr(cls, name))
    return Mortal


def end_at_sigterm() -> None:
    """From now on SIGTERM ends this process as SIGKILL does, as `kill` and spot nodes want it.

    Ray's own handler waits for the calls in flight; some of ours never end. Not by way of
    `signal.signal`, which wants the main thread: an async actor is made in another one.
    """
    set_handler = ctypes.pythonapi.PyOS_setsig
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    set_handler(int(signal.SIGTERM), int(signal.SIG_DFL))


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


def has_ended(handle: Any) -> bool:
    """Whether an actor is gone for good.

    A call that was under way when its process ended raises `ActorDiedError` whether Ray starts the
    actor again or not.
    """
    from ray._private.state import actors

    found = actors(handle._actor_id.hex())
    return not found or found["State"] == "DEAD"


async def as_future(ref: Any) -> Any:
    return await ref
