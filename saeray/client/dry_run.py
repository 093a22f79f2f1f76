"""`saeray sweep FILE.yaml --dry-run`: everything a sweep checks, and what it would come to.

On this machine; with an address the cluster's head node checks, where models and text are read, and
the plan is the cluster's. Nothing is started but that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from saeray.client.features_at_end import cost_at_end
from saeray.errors import ConfigError, SaerayError, bad_value, printable
from saeray.files.wandb_key import lacking
from saeray.spec.checks import cautions
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.grid import expand
from saeray.spec.messages import ModelFacts
from saeray.spec.plan import by_stream, describe, hook_points_of, plan_stream
from saeray.spec.room import Cluster

CHECK_SECONDS = 900.0  # on a cluster: models may have to be downloaded there


def dry_run(
    config: LanguageModelSAERunnerConfig, address: str | None, namespace: str | None
) -> int:
    """Prints the plan; the exit code.

    Raises:
        ConfigError: what the sweep would be refused for.
    """
    from saeray.client.connect import LOCAL, chosen, connected, is_jobs

    saes = expand(resolve(config))
    address = chosen(address)
    if address in (None, LOCAL):
        lines = plan(config, None)
    elif is_jobs(address):
        raise bad_value(
            "address", address, "a job's plan isn't shown; --dry-run takes ray://HOST:10001."
        )
    else:
        with connected(address, namespace):
            lines = planned_there(config)
    print(describe(saes))
    for line in lines:
        print(printable(line))
    return 0


def planned_there(config: LanguageModelSAERunnerConfig) -> list[str]:
    """The plan, as the head node of the cluster has it that this process is connected to.

    Raises:
        ConfigError: what the sweep would be refused for.
    """
    import ray
    from ray.exceptions import RayTaskError

    from saeray.actors.nodes import on_head
    from saeray.client.session import with_absolute_inputs

    task = ray.remote(plan_of_cluster).options(num_cpus=0, **on_head())
    data = with_absolute_inputs(config).to_dict()
    try:
        return list(ray.get(task.remote(data), timeout=CHECK_SECONDS))
    except RayTaskError as error:
        if isinstance(error.cause, SaerayError):
            raise error.cause from None
        raise


def plan_of_cluster(data: dict[str, Any]) -> list[str]:
    """`plan` on the nodes there are and those an autoscaler could add; runs on the head node."""
    from saeray.actors.nodes import cluster_now

    return plan(LanguageModelSAERunnerConfig.from_dict(data), cluster_now())


def plan(config: LanguageModelSAERunnerConfig, cluster: Cluster | None) -> list[str]:
    """Lines of what follows from models, texts and nodes, warnings last.

    cluster: None: this machine alone.

    Raises:
        ConfigError: what the sweep would be refused for; on this machine alone room is no reason.
    """
    from saeray.spec.coefficients import MeanNorms, converted, silencing
    from saeray.spec.recipes import described
    from saeray.stream.check import check_models, check_texts

    saes = expand(resolve(config))
    streams = [[s.config for s in members] for members in by_stream(saes).values()]
    norms: dict[tuple[str, str], MeanNorms] = {}
    facts = check_models([[on_what_there_is(c) for c in of] for of in streams], norms)
    warnings = [text for of in facts for text in of.warnings]
    epochs: list[str] = []
    warnings += check_texts([configs[0] for configs in streams], epochs)
    warnings += [text for s in saes for text in cautions(s.config)]
    warnings += lacking() if config.log_to_wandb else []
    lines = [f"  {text}" for text in dict.fromkeys(described(s.config) for s in saes)]
    for configs, of in zip(streams, facts, strict=True):
        for hook_point in hook_points_of(configs):
            of_hook, width = norms[configs[0].model_name, hook_point], of.d_in[hook_point]
            where = "" if len(norms) == 1 else f"{hook_point}: "
            reading = [c for c in configs if c.hooks_read[0] == hook_point]
            writing = [c for c in configs if c.hooks_read[-1] == hook_point]
            warnings += silencing(writing, width, of_hook)
            d_sae = ", ".join(f"{w:,}" for w in sorted({c.d_sae(width) for c in reading}))
            lines += [f"  {where}d_in {width:,}, d_sae {d_sae}"] if reading else []
            lines += [f"  {where}{text}" for text in converted(writing, width, of_hook)]
    for configs, of, epoch in zip(streams, facts, epochs, strict=True):
        buffer = plan_stream(configs[0], hook_points_of(configs), of.d_in)
        lines.append(f"  text: {epoch}")
        lines.append(
            f"  buffer: {buffer.slots} blocks, {buffer.buffer_bytes:,} bytes of the object store"
        )
        lines += [f"  {text}" for text in placed(configs, of, buffer.buffer_bytes, cluster)]
        if configs[0].features:
            widest = max(c.d_sae(of.d_in[c.hooks_read[0]]) for c in configs)
            lines.append(f"  {cost_at_end(configs[0], len(saes), widest)}")
    return lines + [f"! {text}" for text in dict.fromkeys(warnings)]


def on_what_there_is(config: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """Where this process has no GPU the checks are made without: they are of shapes and words."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return config if there.get(config.device, True) else config.replace(device="cpu")


def placed(
    configs: Sequence[LanguageModelSAERunnerConfig],
    facts: ModelFacts,
    buffer: int,
    cluster: Cluster | None,
) -> list[str]:
    """Where a stream and its SAEs would run and what they would take, in words.

    Raises:
        ConfigError: it fits nowhere on a cluster.
    """
    from saeray.spec.memory import check_memory, fit_saes, gpu_bytes_of, memory_of, size
    from saeray.spec.placement import wants_gpu

    wants_one = configs[0].device == "cuda"
    if cluster is not None:
        where, machine = f"on the cluster of {len(cluster.nodes)} nodes", cluster
    elif wants_one and facts.device != "cuda":
        where, machine = "with a GPU, which this machine has not", this_machine(gpu=True)
    else:
        where, machine = "on this machine alone", this_machine(facts.device == "cuda")
    use_gpu = wants_gpu(configs[0], machine)
    try:
        fitted = fit_saes(configs, machine, use_gpu)
    except ConfigError as error:
        if cluster is not None:
            raise
        return [f"{where}: {error}"]
    taken = memory_of(configs, fitted, facts.d_in, facts.parameter_bytes, buffer)
    if cluster is not None:
        check_memory(taken, fitted, cluster, fitted.harvester_nodes)
    packs = f"{fitted.all_packs} pack{'s' * (fitted.all_packs != 1)}, {fitted.packs} at a time"
    passes = f"{fitted.passes} pass{'es' * (fitted.passes != 1)} of the language model"
    said = fitted.passes_said(configs[0].activation_cache is not None)
    lines = [
        f"{where}: {fitted}",
        f"{where}: {packs}; {passes}",
        f"{where}: {taken}" + (f"; {said}" if said else ""),
    ]
    if fitted.waits_for:
        lines.append(f"it waits for {fitted.waits_for}")
    if use_gpu:
        of_pack, of_model = gpu_bytes_of(configs, fitted, facts.d_in, facts.parameter_bytes)
        lines.append(
            f"GPU memory, without activations: {size(of_pack)} for the largest pack (weights, "
            f"gradients and Adam), {size(of_model)} for a language model"
        )
    return lines


def this_machine(gpu: bool) -> Cluster:
    import psutil  # Ray brings it

    # What Ray would count: a third goes to the object store.
    memory = psutil.virtual_memory().available * 0.7
    return Cluster.one_machine(os.cpu_count() or 1, gpus=float(gpu), memory=memory)
