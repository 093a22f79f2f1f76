"""Where each role runs and with what: the only place that turns plain classes into Ray actors.

Everything is created outside the placement group of whoever asks (a Tune trial, usually), so that
it neither takes the trial's share nor dies with it.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import ray

from saeray.cluster.buffer import ActivationBuffer
from saeray.cluster.harvester import Harvester
from saeray.cluster.token_server import TokenServer
from saeray.config import LanguageModelSAERunnerConfig
from saeray.plan import Cluster, Fitted, StreamPlan, check_fits, plan_stream

NAMESPACE = "saeray"
RESTARTS = 3  # of a pack's worker group
# A call is repeated when its actor dies under it; not for ever, since calls to an actor that was
# killed on purpose are repeated as well.
TASK_RETRIES = 20


@dataclass
class Stream:
    """One LM pass: its actors, and what they found out."""

    key: str
    config: LanguageModelSAERunnerConfig
    hook_points: list[str]
    token_server: Any
    harvesters: list[Any]
    held_out: Any  # reference of the held-out windows
    widths: dict[str, int]
    plan: StreamPlan
    buffer: Any
    evaluations: int = 0  # handed out so far; spreads them over the harvesters

    def actors(self) -> list[Any]:
        return [self.buffer, *self.harvesters, self.token_server]


def actor(cls: type, **options: Any) -> Any:
    return ray.remote(cls).options(
        **{"num_cpus": 0, "scheduling_strategy": "DEFAULT", "namespace": NAMESPACE} | options
    )


def cluster_now() -> Cluster:
    """What the cluster has at this moment."""
    total = ray.cluster_resources()
    return Cluster(
        total.get("CPU", 0.0), total.get("GPU", 0.0), int(total.get("object_store_memory", 0))
    )


async def start_stream(
    key: str,
    configs: list[LanguageModelSAERunnerConfig],
    fitted: Fitted,
) -> Stream:
    """Starts the actors of one stream and has them check model, hooks, widths and dataset.

    Raises:
        ConfigError: something of it is wrong; the actors are gone again.
    """
    config = configs[0]
    hook_points = sorted({c.resolved_hook_point for c in configs})
    as_data = config.to_dict()
    always = {"max_restarts": -1, "max_task_retries": TASK_RETRIES}
    token_server = actor(TokenServer, **always).remote(as_data)
    harvesters = [
        actor(
            Harvester,
            num_cpus=fitted.harvester_cpus,
            num_gpus=fitted.harvester_gpus,
            **always,
        ).remote(as_data, hook_points)
        for _ in range(fitted.harvesters)
    ]
    try:
        facts, _ = await asyncio.gather(
            harvesters[0].check.options(max_task_retries=0).remote([c.to_dict() for c in configs]),
            token_server.check.options(max_task_retries=0).remote(),
        )
        plan = plan_stream(config, hook_points, facts.d_in)
        check_fits(plan, cluster_now())
    except BaseException:
        for a in (token_server, *harvesters):
            ray.kill(a)
        raise
    buffer = actor(ActivationBuffer, max_concurrency=1000).remote(
        plan.order, plan.slots, hook_points, token_server, harvesters
    )
    held_out = token_server.held_out.remote()
    return Stream(
        key, config, hook_points, token_server, harvesters, held_out, facts.d_in, plan, buffer
    )


def fit_pack(
    roster: Any, pack: str, wait_limit_s: float, fitted: Fitted, storage_path: str, sweep: str
) -> None:
    """Runs one pack's TorchTrainer to its end. A task of its own, outside Tune."""
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    from ray import train
    from ray.train.torch import TorchTrainer

    from saeray.cluster.pack import train_pack

    per_worker = {"CPU": fitted.trainer_cpus}
    if fitted.trainer_gpus:
        per_worker["GPU"] = fitted.trainer_gpus
    TorchTrainer(
        train_pack,
        train_loop_config={"roster": roster, "pack": pack, "wait_limit_s": wait_limit_s},
        scaling_config=train.ScalingConfig(
            num_workers=fitted.num_workers,
            use_gpu=fitted.trainer_gpus > 0,
            resources_per_worker=per_worker,
        ),
        run_config=train.RunConfig(
            name=f"{sweep}-{pack}",
            storage_path=storage_path,
            failure_config=train.FailureConfig(max_failures=RESTARTS),
        ),
    ).fit()
