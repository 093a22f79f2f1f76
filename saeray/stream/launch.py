"""Where each actor of a stream runs and with what: started, checked, found again by name.

Everything is created outside the placement group of whoever asks (a Tune trial, usually), so that
it neither takes the trial's share nor dies with it. The actors belong to no process: they outlive
the roster that created them, which finds them again by their names when it was started again:

    <roster>/<stream>/token-server  <roster>/<stream>/harvester-<i>  <roster>/<stream>/buffer

(A stream that sweeps share is called `stream:<key>` instead of `<roster>/<stream>`.) All but the
harvesters live on the head node, whose loss ends the cluster anyway; they take next to no CPU, and
the loss of any other node leaves them alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from saeray.actors.environment import in_own_ray
from saeray.actors.make import actor, as_future, passed_on, placed
from saeray.actors.nodes import cluster_now, namespace, on_head
from saeray.actors.waiting import POLL_SECONDS, RETRY_SECONDS, steadily
from saeray.errors import ConfigError, Late, SaerayError
from saeray.files.cache import identities_of
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fitted import Fitted
from saeray.spec.gpu_memory import check_gpu_memory, gpu_memory_of
from saeray.spec.memory import check_memory, memory_of, packs_that_fit
from saeray.spec.messages import CacheKey, ModelFacts, SpecialTokens
from saeray.spec.placement import store_of
from saeray.spec.plan import StreamPlan, check_fits, hook_points_of, plan_stream
from saeray.spec.room import shown
from saeray.stream.buffer import ActivationBuffer
from saeray.stream.harvester import Harvester
from saeray.stream.token_server import TokenServer

Config = LanguageModelSAERunnerConfig

# A call is repeated when its actor dies under it; not for ever, since calls to an actor that was
# killed on purpose are repeated as well.
TASK_RETRIES = 20
ONCE = {"max_task_retries": 0}
CHECK_TRIES = 5  # of a check whose actor dies under it
STRAGGLER_SECONDS = 5.0  # that a stream's start waits for its other harvesters
SETTLE_SECONDS = 3.0  # for what an earlier sweep held to be given back, before it counts as taken


class NameTaken(Exception):
    """A stream of that name is being started, or runs."""


class AboutStream(NamedTuple):
    """What its buffer knows of a stream, in plain data."""

    name: str
    key: str
    config: dict[str, Any]
    hook_points: list[str]
    widths: dict[str, int]
    plan: StreamPlan
    n_harvesters: int
    nodes: list[str]  # of the harvesters that were up when it began: where its blocks lie
    special: SpecialTokens | None = None  # tokens of its text
    most_packs: int = 0  # that memory has room for at once, their SAEs known; 0: all


@dataclass
class Stream:
    """One LM pass: what it is, and its actors."""

    about: AboutStream
    token_server: Any
    harvesters: list[Any]
    buffer: Any
    ready: list[int]  # harvesters that were up when it began
    shared: bool = False  # with other sweeps
    evaluations: int = 0  # handed out so far; spreads them over the harvesters
    nodes: list[str] = field(default_factory=list)  # of harvesters that this sweep has started
    memory: str = ""  # what it and its packs take, in words
    held_out: Any = None  # reference of the held-out windows, once they are asked for
    warnings: Sequence[str] = ()  # of its model

    @property
    def config(self) -> LanguageModelSAERunnerConfig:
        return LanguageModelSAERunnerConfig.from_dict(self.about.config)

    def actors(self) -> list[Any]:
        return [self.buffer, *self.harvesters, self.token_server]


async def start_stream(
    name: str, key: str, configs: list[Config], fitted: Fitted, later: Sequence[list[Config]] = ()
) -> Stream:
    """Starts the actors of one stream and has them check model, hooks, widths and dataset.

    It begins with the harvesters that have a node; others join it when they get theirs.

    later: configs of each stream that the sweep will start when this one is through; they are
        checked like this one's, before anything is spent.

    Raises:
        ConfigError: something of it is wrong; the actors are gone again.
        Late: no harvester got a node in time.
        NameTaken: somebody else is starting it, or has.
    """
    config, hook_points = configs[0], hook_points_of(configs)
    token_server, harvesters = start_sources(name, config, hook_points, fitted)
    try:
        nodes = await nodes_of(harvesters, config, fitted)
        first = harvesters[min(nodes)]
        facts, special = await checked(first, token_server, configs, later)
        plan = plan_stream(config, hook_points, facts.d_in)
        memory = memory_of(
            configs, fitted, facts.d_in, facts.parameter_bytes, plan.buffer_bytes, in_own_ray()
        )
        cluster, on = cluster_now(), list(nodes.values())
        at_once = packs_that_fit(memory, fitted, cluster, on)
        most_packs = at_once if at_once < memory.packs else 0
        memory = memory.of_packs(at_once)
        check_memory(memory, fitted, cluster, on)
        of_gpus = gpu_memory_of(configs, memory, facts.d_in, facts.parameter_bytes, facts.d_vocab)
        check_gpu_memory(of_gpus, fitted, cluster, on)
        room = await store_room(plan, on)
        cache = None
        if config.activation_cache is not None:
            fingerprints = partial(first.fingerprints.options, **ONCE)
            weights = await surviving(fingerprints, "the harvester (reading the weights)")
            cache = CacheKey(
                config.activation_cache, *identities_of(config, weights, facts.device, facts.d_in)
            )
    except BaseException:
        for a in (token_server, *harvesters):
            ray.kill(a)
        raise
    about = AboutStream(
        name,
        key,
        config.to_dict(),
        hook_points,
        facts.d_in,
        plan,
        fitted.harvesters,
        list(nodes.values()),
        special,
        most_packs,
    )
    absent = sorted(set(range(fitted.harvesters)) - set(nodes))
    return Stream(
        about,
        token_server,
        harvesters,
        start_buffer(about, config, fitted, token_server, harvesters, absent, room, cache),
        sorted(nodes),
        config.share_stream,
        nodes=list(nodes.values()),
        memory=str(memory),
        warnings=facts.warnings,
    )


async def checked(
    harvester: Any, token_server: Any, configs: list[Config], later: Sequence[list[Config]]
) -> tuple[ModelFacts, SpecialTokens]:
    """Facts of a stream's model and text, once both are found right; `later` ones too.

    Raises:
        ConfigError: one of them is not.
    """

    def plain(configs: Sequence[Config]) -> list[dict[str, Any]]:
        return [c.to_dict() for c in configs]

    async def model() -> ModelFacts:
        who = "the harvester"
        if later:  # before: one harvester has room for one model
            others = [plain(other) for other in later]
            found = await surviving(partial(harvester.check_others.options, **ONCE), who, others)
            for facts, other in zip(found, later, strict=True):
                plan_stream(other[0], hook_points_of(other), facts.d_in)
        check = partial(harvester.check.options, **ONCE)
        return await surviving(check, f"{who} (loading the model)", plain(configs))

    async def text() -> SpecialTokens:
        who = "the token server (opening the text)"
        if later:
            others = plain([other[0] for other in later])
            await surviving(partial(token_server.check_others.options, **ONCE), who, others)
        return await surviving(partial(token_server.check.options, **ONCE), who)

    return await asyncio.gather(model(), text())


async def surviving(method: Callable[[], Any], who: str, *arguments: Any) -> Any:
    """What an actor's method answers, asked again when the actor dies under it.

    Not as often as Ray would: what dies every time, of a model too large for the memory, is said.

    Raises:
        SaerayError: it died at each of `CHECK_TRIES` tries, or is gone for good.
    """
    for tries_left in reversed(range(CHECK_TRIES)):
        try:
            return await method().remote(*arguments)
        except ActorUnavailableError as error:
            last = error
        except ActorDiedError as error:
            last, tries_left = error, 0
        if not tries_left:
            text = " ".join(str(last).split())[:400]
            raise SaerayError(
                f"{who} died {CHECK_TRIES} times while it was being started; out of memory? Ray "
                f"says: {text}"
            ) from None
        await asyncio.sleep(RETRY_SECONDS)
    raise AssertionError


def start_sources(
    name: str, config: LanguageModelSAERunnerConfig, hook_points: list[str], fitted: Fitted
) -> tuple[Any, list[Any]]:
    """The token server and the harvesters of a stream.

    Raises:
        NameTaken: somebody else is starting it, or has.
    """
    as_data = config.to_dict()
    try:
        token_server = actor(
            TokenServer,
            f"{name}/token-server",
            max_task_retries=TASK_RETRIES,
            **on_head(),
        ).remote(as_data, passed_on())
    except ValueError as error:
        raise NameTaken(f"{name}: {error}") from None
    harvesters = [
        actor(
            Harvester,
            f"{name}/harvester-{i}",
            max_task_retries=TASK_RETRIES,
            **placed(fitted.harvester),
            **near(fitted, i),
        ).remote(as_data, hook_points, passed_on())
        for i in range(fitted.harvesters)
    ]
    return token_server, harvesters


def start_buffer(
    about: AboutStream,
    config: LanguageModelSAERunnerConfig,
    fitted: Fitted,
    token_server: Any,
    harvesters: list[Any],
    absent: list[int],
    room: int,
    cache: CacheKey | None,
) -> Any:
    """The buffer of a stream whose sources are there; see `ActivationBuffer` for the arguments."""
    return actor(
        ActivationBuffer,
        f"{about.name}/buffer",
        max_concurrency=1000,
        **on_head(),
    ).remote(
        about.plan.order,
        about.plan.slots,
        about.hook_points,
        token_server,
        harvesters,
        lag_s=config.reader_lag_s,
        lag_at_a_time=fitted.share_cores,
        room=room,
        cache=cache,
        about=about,
        absent=absent,
        shared=config.share_stream,
    )


async def store_room(plan: StreamPlan, nodes: list[str]) -> int:
    """Blocks for which there is object store beside what other streams may take of it.

    Raises:
        ConfigError: not enough; with the numbers.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        store = store_of(cluster_now(), nodes, await held_by_buffers())
        try:
            return check_fits(plan, store)
        except ConfigError:
            if not store.held or time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.5)  # the one that holds it may just be going


async def held_by_buffers() -> Counter[str]:
    """What the buffers of all streams of the cluster may take of each node's store, in bytes."""
    held: Counter[str] = Counter()
    for a in await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True):
        if "stream" not in a["name"] or not a["name"].endswith("/buffer"):
            continue
        try:
            buffer = ray.get_actor(a["name"], a["namespace"])
            about = await asyncio.wait_for(as_future(buffer.describe.remote()), POLL_SECONDS)
        except (ValueError, TimeoutError, asyncio.TimeoutError, RayError):
            continue  # just gone, or being started again
        for node in about.nodes:
            held[node] += about.plan.buffer_bytes // len(about.nodes)
    return held


async def running_stream(name: str) -> Stream | None:
    """The stream of that name, if it runs."""
    try:
        buffer = ray.get_actor(f"{name}/buffer", namespace())
        about: AboutStream = await steadily(buffer.describe.remote)
        token_server = ray.get_actor(f"{name}/token-server", namespace())
        harvesters = [
            ray.get_actor(f"{name}/harvester-{i}", namespace()) for i in range(about.n_harvesters)
        ]
    except (ValueError, RayActorError):
        return None  # not there, or just gone
    config = LanguageModelSAERunnerConfig.from_dict(about.config)
    ready = list(range(about.n_harvesters))
    return Stream(about, token_server, harvesters, buffer, ready, config.share_stream)


async def join_stream(stream: Stream, user: str) -> bool:
    """Whether this sweep is now one of a shared stream's; it may just be closing."""
    try:
        return bool(await stream.buffer.join.remote(user))
    except RayActorError:
        return False


def near(fitted: Fitted, i: int) -> dict[str, Any]:
    """Where the plan saw harvester i: elsewhere it might take a trainer's only place."""
    if fitted.harvester_labels or i >= len(fitted.harvester_nodes):
        return {}
    node = fitted.harvester_nodes[i]
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)}


async def nodes_of(
    harvesters: list[Any], config: LanguageModelSAERunnerConfig, fitted: Fitted
) -> dict[int, str]:
    """The node of each harvester that has one: all of them, or those that came in time.

    Raises:
        Late: none came; says what it needs, and what there is.
    """
    calls = {asyncio.ensure_future(as_future(h.node.remote())): i for i, h in enumerate(harvesters)}
    limit = config.resources.node_wait_s if fitted.waits_for else config.wait_limit_s
    done, late = await asyncio.wait(calls, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    if late and done:
        more, late = await asyncio.wait(late, timeout=STRAGGLER_SECONDS)
        done |= more
    for call in late:
        call.cancel()
    if not done:
        which = "resources.node_wait_s" if fitted.waits_for else "wait_limit_s"
        raise Late(
            f"no harvester has started within {limit:g} s ({which}): each needs "
            f"{fitted.harvester}, and the cluster has {cluster_now()}, of which "
            f"{shown(ray.available_resources())} is free."
        )
    return {calls[call]: call.result() for call in done}
