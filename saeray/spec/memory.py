"""Main memory that a sweep takes, node by node, beside the object store.

Plain data. What processes take by themselves was measured (proportional set size, so that what
they share counts once) on Linux with Python 3.11, torch 2.13, transformers 5 and Ray 2.60.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fitted import Fitted
from saeray.spec.grid import SAE
from saeray.spec.placement import fit
from saeray.spec.plan import DTYPE_BYTES, cut_packs, kinds_of
from saeray.spec.room import Cluster, Room

HARVESTER = 0.65e9  # torch and TransformerLens, beside the weights
# Weights of SAEs that a harvester has at a time, to evaluate them or to pick rows for their dead
# features; of one that is larger, its own.
SAES_AT_HARVESTER = 1 << 28
WORKER = 0.65e9  # of a rank of a pack, beside its SAEs
PACK = 1.2e9  # Ray Train's own processes for one pack, on the head node
TRIAL = 0.12e9  # Tune's process for one SAE, on the head node
TRIALS_AT_ONCE = 16  # where no scheduler decides on what they report
SWEEP = 1.1e9  # roster, driver, token server and buffer, on the head node
# Of an SAE in training, in numbers per parameter: weights, two moments of Adam and the gradient;
# and a copy of the first three, which a checkpoint is written from (in a bare tune.run it is there
# all the time: saeray.cluster.held). Of one SAE at a time this copy is there once more, as the
# bytes of the files.
COPIED = 3
NUMBERS_PER_PARAMETER = 4 + COPIED


class Memory(NamedTuple):
    """Bytes of main memory, by what takes them."""

    object_store: int  # of the buffer
    language_model: int  # each harvester
    harvesters: int
    each_pack: tuple[int, ...]  # the largest ones' ranks, with their SAEs, of those at once
    trials: int  # all of them together

    @property
    def packs(self) -> int:
        """At once."""
        return len(self.each_pack)

    @property
    def pack(self) -> int:
        """The largest one."""
        return max(self.each_pack)

    def of_packs(self, n: int) -> Memory:
        """With no more than so many of its packs at once."""
        return self._replace(each_pack=self.each_pack[:n])

    def __str__(self) -> str:
        parts = [f"{size(self.object_store)} of the object store"]
        if self.harvesters:
            parts.append(f"{self.harvesters} x {size(self.language_model)} for harvesters")
        if min(self.each_pack) == self.pack:
            parts.append(f"{self.packs} x {size(self.pack + PACK)} for packs")
        else:
            together = sum(self.each_pack) + self.packs * PACK
            parts.append(f"{size(together)} for {self.packs} packs")
        parts.append(f"{size(self.trials)} for trials")
        parts.append(f"{size(SWEEP)} for the rest")
        return "memory: " + ", ".join(parts)


def memory_of(
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    widths: Mapping[str, int],
    parameter_bytes: int,
    buffer_bytes: int,
) -> Memory:
    """What these SAEs take, on one stream.

    widths: d_in by hook point. parameter_bytes: of the language model's weights.
    """
    on_gpu = fitted.trainer_gpus > 0

    def of(sae: SAE, on_gpu: bool) -> int:
        return sae_bytes(sae.config, widths, on_gpu)

    def ranks(members: list[SAE]) -> int:
        one = int(WORKER) + sum(of(sae, on_gpu) for sae in members)
        return fitted.num_workers * one + max(of(sae, on_gpu=True) for sae in members)

    weights = [of(SAE("", c), on_gpu=True) // COPIED for c in configs]
    at_harvester = max(max(weights), min(sum(weights), SAES_AT_HARVESTER))
    packs = cut_packs([SAE("", c) for c in configs], fitted.saes_per_trainer)
    scheduled = any(c.scheduler is not None for c in configs)
    trials = len(configs) if scheduled else min(len(configs), TRIALS_AT_ONCE)
    return Memory(
        buffer_bytes,
        int(HARVESTER) + parameter_bytes + at_harvester,
        fitted.harvesters,
        tuple(sorted(map(ranks, packs), reverse=True)[: fitted.packs]),
        int(TRIAL) * trials,
    )


def fit_saes(
    configs: Sequence[LanguageModelSAERunnerConfig],
    cluster: Cluster,
    use_gpu: bool,
    harvest: bool = True,
) -> Fitted:
    """`fit` of these SAEs, with no more packs at a time than main memory has room for.

    That is told from what processes take by themselves, and from the SAEs where `d_in` is given:
    the language model is yet to be loaded.

    Raises:
        ConfigError: as `fit`.
    """
    resources = configs[0].resources
    kinds = [len(kind) for kind in kinds_of([SAE("", c) for c in configs])]
    fitted = fit(resources, cluster, kinds, use_gpu, harvest)
    widths = {hook: c.d_in or 0 for c in configs for hook in c.hooks_read}
    memory = memory_of(configs, fitted, widths, 0, 0)
    most = packs_that_fit(memory, fitted, cluster, fitted.harvester_nodes)
    if most == fitted.packs:
        return fitted
    return fit(resources, cluster, kinds, use_gpu, harvest, most)


def packs_that_fit(
    memory: Memory, fitted: Fitted, cluster: Cluster, harvester_nodes: Sequence[str]
) -> int:
    """How many of its packs may run at the same time; one, at least."""
    for n in range(memory.packs, 1, -1):
        try:
            check_memory(memory.of_packs(n), fitted, cluster, harvester_nodes)
        except ConfigError:
            continue
        return n
    return 1


def sae_bytes(
    config: LanguageModelSAERunnerConfig, widths: Mapping[str, int], on_gpu: bool = False
) -> int:
    """Main memory of one SAE in training; on a GPU only the copy for a checkpoint is in it.

    widths: of activations, by hook point.
    """
    d_in, d_out = widths[config.hooks_read[0]], widths[config.hooks_read[-1]]
    d_sae = config.d_sae(d_in)
    parameters = (d_in + d_out) * d_sae + d_in + d_sae
    if config.hook_point_out is not None:
        parameters += d_out * (1 + config.skip_connection * d_in)
    numbers = COPIED if on_gpu else NUMBERS_PER_PARAMETER
    return parameters * numbers * DTYPE_BYTES[config.dtype]


def gpu_bytes_of(
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    widths: Mapping[str, int],
    parameter_bytes: int,
) -> tuple[int, int]:
    """Of a rank of the largest pack on a GPU and of a language model, both without activations."""
    packs = cut_packs([SAE("", c) for c in configs], fitted.saes_per_trainer)

    def of(sae: SAE) -> int:
        copy = sae_bytes(sae.config, widths, on_gpu=True)
        return copy // COPIED * (NUMBERS_PER_PARAMETER - COPIED)

    return max(sum(map(of, pack)) for pack in packs), parameter_bytes


def check_memory(
    memory: Memory, fitted: Fitted, cluster: Cluster, harvester_nodes: Sequence[str]
) -> None:
    """Refuses what can't fit into a node, as far as Ray knows of the nodes' memory.

    harvester_nodes: ids of the nodes of the harvesters that are up.

    Raises:
        ConfigError: with the numbers, and what would take less.
    """
    room = Room(cluster.nodes)
    taken: dict[int, Counter[str]] = {at: Counter() for at in range(len(room.nodes))}
    index = {node.id: at for at, node in enumerate(room.nodes)}
    for node_id in harvester_nodes:
        if node_id in index:
            taken[index[node_id]]["the language model"] += memory.language_model
            room.take(node_id, fitted.harvester)
    for pack in memory.each_pack:
        for node in [room.place(fitted.trainer) for _ in range(fitted.num_workers)]:
            if node is not None:
                taken[index[node.id]]["packs"] += pack // fitted.num_workers
    for at, node in enumerate(room.nodes):
        if node.is_head:
            taken[at]["Ray Train"] += int(PACK) * memory.packs
            taken[at]["trials"] += memory.trials
            taken[at]["the rest"] += int(SWEEP)
        there = node.resources.get("memory", 0.0)
        if there and sum(taken[at].values()) > there:
            parts = ", ".join(f"{size(n)} for {what}" for what, n in taken[at].most_common())
            raise ConfigError(
                f"memory: {size(sum(taken[at].values()))} are needed on {node.name} ({parts}), "
                f"but Ray has {size(there)} there. Train fewer SAEs at a time, lower "
                "expansion_factor, use a larger resources.saes_per_trainer (fewer packs), or give "
                "it a larger node (ray start --memory, if Ray counts too little)."
            )


def size(n_bytes: float) -> str:
    for unit, of in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= of:
            return f"{n_bytes / of:.3g} {unit}"
    return f"{n_bytes / 1e3:.3g} kB"
