"""What a sweep will need, computed before anything starts: packs, memory, tokens, steps.

Plain data: nothing here knows of Ray; the caller says what the cluster has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from saeray.config import AUTO, LanguageModelSAERunnerConfig, Resources, stream_key
from saeray.errors import ConfigError
from saeray.grid import SAE
from saeray.shuffle import StreamOrder

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# Of the object store the buffer may take this share: Ray begins to spill to disk at 0.8
# (object_spilling_threshold), and snapshots of weights need some as well.
STORE_SHARE = 0.75


class Cluster(NamedTuple):
    """What there is to fit a sweep into."""

    cpus: float
    gpus: float
    object_store_bytes: int


class StreamPlan(NamedTuple):
    """One LM pass."""

    order: StreamOrder
    hook_points: list[str]
    block_bytes: int  # of one block at all hook points
    slots: int  # blocks the buffer may hold

    @property
    def buffer_bytes(self) -> int:
        return self.block_bytes * self.slots


@dataclass(frozen=True)
class Fitted:
    """`resources:` with every "auto" decided."""

    harvesters: int
    harvester_cpus: float
    harvester_gpus: float
    saes_per_trainer: int
    num_workers: int
    trainer_cpus: float
    trainer_gpus: float
    threads: int
    why: str

    def packs_at_once(self, cluster: Cluster) -> int:
        """How many packs have room beside the harvesters; at least one."""
        cpus = cluster.cpus - self.harvesters * self.harvester_cpus
        rooms = [cpus / (self.num_workers * self.trainer_cpus)] if self.trainer_cpus else []
        if self.trainer_gpus:
            gpus = cluster.gpus - self.harvesters * self.harvester_gpus
            rooms.append(gpus / (self.num_workers * self.trainer_gpus))
        return max(1, int(min(rooms, default=1) + 1e-6))


def plan_stream(
    config: LanguageModelSAERunnerConfig, hook_points: Sequence[str], widths: dict[str, int]
) -> StreamPlan:
    """The stream's geometry and its bound in memory.

    Three groups (one and a half buffers) hold the two groups a window is mixed of while the next
    one is harvested; `buffer_bytes` can make it more, or less down to two.

    Raises:
        ConfigError: buffer_bytes is too small for two groups.
    """
    assert config.stream_tokens is not None and config.data_seed is not None
    order = StreamOrder.of(
        config.stream_tokens, config.block_rows, config.n_batches_in_buffer, config.data_seed
    )
    row_bytes = sum(widths[h] for h in hook_points) * DTYPE_BYTES[config.activation_dtype]
    block_bytes = order.block_rows * row_bytes
    least = min(2 * order.group_blocks, order.n_blocks)
    if config.buffer_bytes is None:
        slots = min(3 * order.group_blocks, order.n_blocks)
    else:
        slots = config.buffer_bytes // block_bytes
        if slots < least:
            raise ConfigError(
                f"buffer_bytes = {config.buffer_bytes:,}: n_batches_in_buffer = "
                f"{config.n_batches_in_buffer} LM batches of {order.block_rows:,} activations are "
                f"{least * block_bytes:,} bytes, which is the least; raise it or lower "
                "n_batches_in_buffer."
            )
    return StreamPlan(order, list(hook_points), block_bytes, slots)


def check_fits(plan: StreamPlan, cluster: Cluster) -> int:
    """Refuses a buffer that the object store can't hold; how many blocks it could hold.

    Raises:
        ConfigError: with the numbers.
    """
    limit = int(cluster.object_store_bytes * STORE_SHARE)
    if plan.buffer_bytes > limit:
        group = plan.order.group_blocks * plan.block_bytes
        raise ConfigError(
            f"n_batches_in_buffer: the buffer takes {plan.buffer_bytes:,} bytes ({plan.slots} "
            f"blocks of {plan.block_bytes:,}), but the object store has "
            f"{cluster.object_store_bytes:,}, of which {limit:,} may be used. Lower "
            "n_batches_in_buffer or store_batch_size, use activation_dtype: bfloat16, set "
            f"buffer_bytes (at least {2 * group:,}), or give Ray a larger object store."
        )
    return limit // plan.block_bytes


def wants_gpu(config: LanguageModelSAERunnerConfig, cluster: Cluster) -> bool:
    """Whether the trainers go onto GPUs: as `device` says, or where "auto" finds some."""
    kind = config.device.split(":")[0]
    return kind == "cuda" or (kind == AUTO and cluster.gpus > 0)


def fit(resources: Resources, cluster: Cluster, n_saes: int, use_gpu: bool) -> Fitted:
    """Decides every "auto" from what the cluster has.

    On CPUs: one harvester, and one pack of all SAEs with a thread per core: the SAEs of a pack
    share each batch, and a second pack on the same cores would only read it twice. On GPUs: one
    pack per GPU that is left after the harvesters (which share one GPU with the trainers when there
    is only one).

    Raises:
        ConfigError: what is asked for is more than the cluster has.
    """
    harvesters = 1 if resources.harvesters == AUTO else int(resources.harvesters)
    fitted = Fitted(
        harvesters=harvesters,
        harvester_cpus=resources.harvester_cpus,
        harvester_gpus=0.0,
        saes_per_trainer=n_saes,
        num_workers=resources.num_workers,
        trainer_cpus=1.0,
        trainer_gpus=0.0,
        threads=1,
        why="",
    )
    if use_gpu:
        if cluster.gpus < 1:
            raise ConfigError("device = 'cuda': the cluster has no GPU; use device: cpu.")
        alone = cluster.gpus == 1
        gpus_left = cluster.gpus if alone else max(1.0, cluster.gpus - harvesters)
        fitted = replace(
            fitted,
            harvester_gpus=0.25 / harvesters if alone else 1.0,
            trainer_gpus=0.75 if alone else 1.0,
            saes_per_trainer=-(-n_saes // max(1, int(gpus_left) // resources.num_workers)),
            why="one pack per GPU beside the harvesters",
        )
    else:
        reserved = harvesters * resources.harvester_cpus
        left = (cluster.cpus - reserved) / resources.num_workers
        fitted = replace(
            fitted,
            # Ray takes whole numbers above 1.
            trainer_cpus=float(int(left)) if left >= 1 else max(0.1, int(left * 100) / 100),
            threads=max(1, int(cluster.cpus / resources.num_workers)),
            why="one pack of all SAEs on this machine's cores",
        )
    if resources.saes_per_trainer != AUTO:
        fitted = replace(
            fitted,
            saes_per_trainer=int(resources.saes_per_trainer),
            why="saes_per_trainer as given",
        )
        n_packs = -(-n_saes // fitted.saes_per_trainer)
        if not use_gpu and n_packs > 1:
            n_ranks = n_packs * resources.num_workers
            share = max(0.1, (cluster.cpus - harvesters * resources.harvester_cpus) / n_ranks)
            fitted = replace(
                fitted,
                trainer_cpus=float(int(share)) if share >= 1 else round(share - 0.005, 2),
                threads=max(1, int(cluster.cpus // n_ranks)),
            )
    if resources.trainer_cpus != AUTO:
        fitted = replace(
            fitted,
            trainer_cpus=float(resources.trainer_cpus),
            threads=max(1, int(float(resources.trainer_cpus))),
        )
    if resources.trainer_gpus != AUTO:
        fitted = replace(fitted, trainer_gpus=float(resources.trainer_gpus))
    if resources.harvester_gpus != AUTO:
        fitted = replace(fitted, harvester_gpus=float(resources.harvester_gpus))
    check_resources(fitted, cluster)
    return fitted


def check_resources(fitted: Fitted, cluster: Cluster) -> None:
    """The harvesters and at least one pack must fit at the same time."""
    for what, have, harvester, trainer in (
        ("CPUs", cluster.cpus, fitted.harvester_cpus, fitted.trainer_cpus),
        ("GPUs", cluster.gpus, fitted.harvester_gpus, fitted.trainer_gpus),
    ):
        need = fitted.harvesters * harvester + fitted.num_workers * trainer
        if need > have + 1e-6:
            raise ConfigError(
                f"resources: {fitted.harvesters} harvesters of {harvester:g} {what} and "
                f"{fitted.num_workers} trainer of {trainer:g} need {need:g} {what}, and the "
                f"cluster has {have:g}; lower one of them."
            )


def pack_key(sae: SAE) -> tuple[object, ...]:
    """SAEs that agree in this may train together from one reader."""
    c = sae.config
    return (stream_key(c), c.resolved_hook_point, c.train_batch_size, c.wait_limit_s)


def cut_packs(saes: Sequence[SAE], per_pack: int) -> list[list[SAE]]:
    """Packs of at most `per_pack`, of SAEs that may train together, as even as can be."""
    by_key: dict[tuple[object, ...], list[SAE]] = {}
    for sae in saes:
        by_key.setdefault(pack_key(sae), []).append(sae)
    packs = []
    for members in by_key.values():
        n = -(-len(members) // per_pack)
        sizes = [len(members) // n + (i < len(members) % n) for i in range(n)]
        at = 0
        for size in sizes:
            packs.append(members[at : at + size])
            at += size
    return packs


def describe(saes: Sequence[SAE]) -> str:
    """The plan of a sweep in words, for --dry-run."""
    streams: dict[str, list[SAE]] = {}
    for sae in saes:
        streams.setdefault(stream_key(sae.config), []).append(sae)
    lines = [f"{len(saes)} SAEs on {len(streams)} activation stream(s)"]
    for members in streams.values():
        c = members[0].config
        hooks = sorted({m.config.resolved_hook_point for m in members})
        assert c.stream_tokens is not None and c.data_seed is not None
        order = StreamOrder.of(c.stream_tokens, c.block_rows, c.n_batches_in_buffer, c.data_seed)
        lines.append(
            f"  {c.model_name} at {', '.join(hooks)}: {order.n_rows:,} LM tokens in "
            f"{order.n_blocks} blocks of {order.block_rows:,}; buffer of {c.n_batches_in_buffer} "
            f"blocks ({c.n_batches_in_buffer * c.block_rows:,} activations)"
        )
        lines += [f"    {m.name}: {m.config.steps:,} steps" for m in members]
    return "\n".join(lines)
