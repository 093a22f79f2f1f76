"""A sweep planned: everything it checks, where it would run, what it would take (`Plan`).

On this machine; with an address the cluster's head node checks, where models and texts are read,
and the plan is the cluster's. Nothing is started but that, and a calibration if one is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from saeray.client.measuring import speeds_for
from saeray.client.plan import Figures, Plan
from saeray.errors import ConfigError, SaerayError, bad_value, printable
from saeray.files.wandb_key import lacking
from saeray.spec.advice import advice
from saeray.spec.checks import cautions
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.fitted import Fitted
from saeray.spec.forecast import Work, forecast, work_of
from saeray.spec.grid import expand
from saeray.spec.memory import check_memory, fit_saes, memory_of, size
from saeray.spec.messages import ModelFacts
from saeray.spec.placement import store_of, wants_gpu
from saeray.spec.plan import (
    StreamPlan,
    by_stream,
    check_fits,
    describe,
    hook_points_of,
    plan_stream,
)
from saeray.spec.room import Cluster
from saeray.spec.synthetic import is_synthetic

CHECK_SECONDS = 900.0  # on a cluster: models may have to be downloaded there
RAYS_SHARE = 0.3  # of what is free, that Ray takes for its object store


def dry_run(
    config: LanguageModelSAERunnerConfig, address: str | None, namespace: str | None
) -> int:
    """Prints the plan, without times; the exit code.

    Raises:
        ConfigError: what the sweep would be refused for.
    """
    print(printable(str(planned(config, address, namespace, Figures(calibrate=False)))))
    return 0


def planned(
    config: LanguageModelSAERunnerConfig,
    address: str | None,
    namespace: str | None,
    figures: Figures,
) -> Plan:
    """The plan of a sweep here, or on the cluster at an address.

    Raises:
        ConfigError: what the sweep would be refused for.
    """
    from saeray.client.connect import LOCAL, chosen, connected, is_jobs

    expand(resolve(config))
    address = chosen(address)
    if address in (None, LOCAL):
        return plan_on(config, None, figures)
    if is_jobs(address):
        raise bad_value(
            "address", address, "a job's plan isn't shown; --dry-run takes ray://HOST:10001."
        )
    with connected(address, namespace):
        return planned_there(config, figures)


def planned_there(config: LanguageModelSAERunnerConfig, figures: Figures) -> Plan:
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
        found: Plan = ray.get(task.remote(data, figures), timeout=CHECK_SECONDS)
    except RayTaskError as error:
        if isinstance(error.cause, SaerayError):
            raise error.cause from None
        raise
    return found


def plan_of_cluster(data: dict[str, Any], figures: Figures) -> Plan:
    """`plan_on` the nodes there are and those an autoscaler could add; runs on the head node."""
    from saeray.actors.nodes import cluster_now

    return plan_on(LanguageModelSAERunnerConfig.from_dict(data), cluster_now(), figures)


def plan_on(
    config: LanguageModelSAERunnerConfig, cluster: Cluster | None, figures: Figures
) -> Plan:
    """What follows from models, texts and nodes.

    cluster: None: this machine alone.

    Raises:
        ConfigError: what the sweep would be refused for.
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
    made = Plan(len(saes), describe(saes), lines)
    for configs, of, epoch in zip(streams, facts, epochs, strict=True):
        buffer = plan_stream(configs[0], hook_points_of(configs), of.d_in)
        lines.append(f"  text: {epoch}")
        lines.append(
            f"  buffer: {buffer.slots} blocks, {buffer.buffer_bytes:,} bytes of the object store"
        )
        add_stream(made, configs, of, buffer, cluster, figures)
    made.warnings = list(dict.fromkeys(warnings))
    return made


def on_what_there_is(config: LanguageModelSAERunnerConfig) -> LanguageModelSAERunnerConfig:
    """Where this process has no GPU the checks are made without: they are of shapes and words."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return config if there.get(config.device, True) else config.replace(device="cpu")


def add_stream(
    made: Plan,
    configs: Sequence[LanguageModelSAERunnerConfig],
    facts: ModelFacts,
    buffer: StreamPlan,
    cluster: Cluster | None,
    figures: Figures,
) -> None:
    """To a plan, where a stream and its SAEs would run and what they would take.

    Raises:
        ConfigError: it does not fit where it would run.
    """
    wants_one = configs[0].device == "cuda"
    imagined = False
    if cluster is not None:
        where, machine = f"on the cluster of {len(cluster.nodes)} nodes", cluster
    elif wants_one and facts.device != "cuda":
        imagined = True
        where, machine = "with a GPU, which this machine has not", this_machine(gpu=True)
    else:
        where, machine = "on this machine alone", this_machine(facts.device == "cuda")
    use_gpu = wants_gpu(configs[0], machine)
    try:
        fitted = fit_saes(configs, machine, use_gpu)
    except ConfigError as error:
        if not imagined:
            raise
        made.lines.append(f"  {where}: {error}")
        return
    own = cluster is None
    taken = memory_of(configs, fitted, facts.d_in, facts.parameter_bytes, buffer.buffer_bytes, own)
    if not imagined:
        check_memory(taken, fitted, machine, fitted.harvester_nodes)
        check_fits(buffer, store_of(machine, fitted.harvester_nodes or ["this machine"]))
    packs = f"{fitted.all_packs} pack{'s' * (fitted.all_packs != 1)}, {fitted.packs} at a time"
    passes = f"{fitted.passes} pass{'es' * (fitted.passes != 1)} of the language model"
    said = fitted.passes_said(configs[0].activation_cache is not None)
    process = "" if use_gpu else f"{size(taken.trainer.process)} the process, "
    lines = [
        f"{where}: {fitted}",
        f"{where}: {packs}; {passes}",
        f"{where}: {taken}" + (f"; {said}" if said else ""),
        f"a trainer: {process}{taken.trainer}; {size(taken.trainer.copies)} more main memory while "
        "a checkpoint is written",
        f"on the head node, trainers and language models not counted: {size(taken.head)}; of all "
        f"processes together about {size(taken.total)}",
    ]
    if fitted.waits_for:
        lines.append(f"it waits for {fitted.waits_for}")
    if use_gpu:
        lines.append(on_gpus(configs, fitted, facts, taken, machine, imagined))
    made.lines += [f"  {text}" for text in lines]
    made.object_store_bytes += buffer.buffer_bytes
    made.memory_bytes = max(made.memory_bytes, taken.total)
    add_time(made, configs, fitted, facts, buffer, None if cluster is None else machine, figures)


def on_gpus(
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    facts: ModelFacts,
    taken: Any,
    machine: Cluster,
    imagined: bool,
) -> str:
    """What is taken of GPU memory, in words.

    Raises:
        ConfigError: more than the GPUs have.
    """
    from saeray.spec.gpu_memory import check_gpu_memory, gpu_memory_of

    of_gpus = gpu_memory_of(configs, taken, facts.d_in, facts.parameter_bytes, facts.d_vocab)
    if not imagined:
        asked = facts.device == "cuda" and len(machine.nodes) == 1 and not machine.planned
        check_gpu_memory(
            of_gpus, fitted, machine, fitted.harvester_nodes, gpu_bytes_here() if asked else 0.0
        )
    return str(of_gpus)


def add_time(
    made: Plan,
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    facts: ModelFacts,
    buffer: StreamPlan,
    cluster: Cluster | None,
    figures: Figures,
) -> None:
    """How long a stream and its SAEs take, as far as anything says how fast the parts are."""
    work = work_of(configs, fitted, buffer, facts.d_in)
    known = is_synthetic(configs[0].model_name)
    made.harvest = "what makes the rows" if known else made.harvest
    made.lines.append(f"  {rows_said_of(work) if known else tokens_said(work)}")
    found = speeds_for(made, configs, fitted, facts, cluster, figures)
    if found is None:
        made.take(work, None)
        return
    now = forecast(work, found.speeds)
    if work.evaluated and found.speeds.forward:
        spent = work.evaluated * found.speeds.forward
        made.lines.append(f"  evaluation takes a harvester {spent:.1f} s")
    made.take(work, now)
    two = found.two_harvesters
    here = advice(work, found.speeds, fitted, two or 2.0, measured=two is not None)
    made.advice += [one for one in here if one not in made.advice]


def tokens_said(work: Work) -> str:
    """What the language model computes."""
    share = work.evaluated / work.lm_tokens if work.lm_tokens else 0.0
    passes = len([w for w in work.waves if not w.cached])
    return (
        f"language model: {work.lm_tokens:,} tokens in {passes} pass{'es' * (passes != 1)}, up to "
        f"the hook point; evaluation: {work.evaluated:,} more in whole forwards ({share:.1%})"
    )


def rows_said_of(work: Work) -> str:
    """What is made in its place where features are known."""
    return f"known features: {work.lm_tokens:,} rows; evaluation: {work.evaluated:,} more"


def this_machine(gpu: bool) -> Cluster:
    """As a Ray that is started here would count it."""
    import psutil  # Ray brings it

    free = psutil.virtual_memory().available
    store, left = RAYS_SHARE * free, (1 - RAYS_SHARE) * free
    if os.path.isdir("/dev/shm"):
        store = min(store, 0.95 * psutil.disk_usage("/dev/shm").free)
    return Cluster.one_machine(os.cpu_count() or 1, float(gpu), int(store), left)


def gpu_bytes_here() -> float:
    """Of this machine's first GPU."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory)
