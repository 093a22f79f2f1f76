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
# Ray Train's own processes for one pack, on the head node: its launcher, controller and barrier.
# Those of several ranks import torch (`TorchTrainer`).
PACK = 0.38e9
PACK_OF_RANKS = 1.2e9
TRIAL = 0.125e9  # Tune's process for one SAE, on the head node
TRIALS_AT_ONCE = 16  # where no scheduler decides on what they report
SWEEP = 1.1e9  # roster, driver, token server and buffer, on the head node
OWN_SWEEP = 1.0e9  # the same in a Ray of one's own, that Ray's processes included
# Of an SAE in training, in numbers per parameter: weights and two moments of Adam; and a copy of
# them, which a checkpoint is written from (in a bare tune.run it is there all the time:
# saeray.cluster.held). Of one SAE at a time this copy is there once more, as the bytes of the
# files. Gradients belong to the threads.
COPIED = 3
EVALUATED_TOGETHER = 8  # SAEs: they share a harvester's forward of the model without any
LANE_ROWS = 1024  # of a batch, that one thread takes at a time (`saeray.sae.gradients`)
BLOCK_BYTES = 1 << 21  # of activations [rows, d_sae] in its cache, of which it has three
# On a GPU, of the standard SAE's step (`saeray.sae.gpu`, `saeray.sae.trainer`).
CHUNK_BYTES = 96 << 20  # of pre-activations at a time
MOST_ACTIVE = {"float32": 1 / 20, "tf32": 1 / 75, "bfloat16": 1 / 200}  # else it is dense
BATCHES = 4  # of rows that a rank holds: read ahead, in the step, and their errors


class TrainerMemory(NamedTuple):
    """Bytes that a rank of a pack takes, in main memory or, of the middle ones, on its GPU."""

    process: int
    weights: int
    adam: int
    gradients: int
    activations: int  # rows, what the step makes of them, and their errors
    copies: int  # that checkpoints are written from; in main memory

    @property
    def on_device(self) -> int:
        """What is where the SAEs are trained."""
        return self.weights + self.adam + self.gradients + self.activations

    def __str__(self) -> str:
        parts = [
            f"{size(n)} {what}"
            for n, what in (
                (self.weights, "weights"),
                (self.adam, "Adam"),
                (self.gradients, "gradients"),
                (self.activations, "activations"),
            )
        ]
        return ", ".join(parts)


class Memory(NamedTuple):
    """Bytes of main memory, by what takes them."""

    object_store: int  # of the buffer
    language_model: int  # each harvester
    harvesters: int
    each_pack: tuple[int, ...]  # the largest ones' ranks, with their SAEs, of those at once
    trials: int  # all of them together
    trainer: TrainerMemory  # the largest pack's rank
    of_pack: int = int(PACK)  # Ray Train's own processes, for each pack
    saes_at_harvester: int = 0  # of its memory
    rest: int = int(SWEEP)

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
            parts.append(f"{self.packs} x {size(self.pack + self.of_pack)} for packs")
        else:
            together = sum(self.each_pack) + self.packs * self.of_pack
            parts.append(f"{size(together)} for {self.packs} packs")
        parts.append(f"{size(self.trials)} for trials")
        parts.append(f"{size(self.rest)} for the rest")
        return "memory: " + ", ".join(parts)

    @property
    def head(self) -> int:
        """What is on the head node in any case, harvesters and trainers not counted."""
        return self.packs * self.of_pack + self.trials + self.rest

    @property
    def total(self) -> int:
        """Of all processes together, and the object store."""
        together = sum(self.each_pack) + self.harvesters * self.language_model
        return self.object_store + together + self.head


def memory_of(
    configs: Sequence[LanguageModelSAERunnerConfig],
    fitted: Fitted,
    widths: Mapping[str, int],
    parameter_bytes: int,
    buffer_bytes: int,
    own_ray: bool = False,
) -> Memory:
    """What these SAEs take, on one stream.

    widths: d_in by hook point. parameter_bytes: of the language model's weights. own_ray: a Ray
    that is started for this sweep alone.
    """
    on_gpu = fitted.trainer_gpus > 0
    packs = cut_packs([SAE("", c) for c in configs], fitted.saes_per_trainer)

    def rank(members: list[SAE]) -> TrainerMemory:
        return trainer_memory([sae.config for sae in members], fitted.threads, widths, on_gpu)

    def ranks(members: list[SAE]) -> int:
        one = rank(members)
        here = one.process + one.copies + (0 if on_gpu else one.on_device)
        return fitted.num_workers * here + max(sae_bytes(m.config, widths, True) for m in members)

    weights = [sae_bytes(c, widths, on_gpu=True) // COPIED for c in configs]
    at_harvester = max(max(weights), min(sum(weights), SAES_AT_HARVESTER))
    largest = max(packs, key=ranks)
    return Memory(
        buffer_bytes,
        int(HARVESTER) + parameter_bytes + at_harvester,
        fitted.harvesters,
        tuple(sorted(map(ranks, packs), reverse=True)[: fitted.packs]),
        int(TRIAL) * trials_at_once(configs),
        rank(largest),
        int(PACK if fitted.num_workers == 1 else PACK_OF_RANKS),
        at_harvester,
        int(OWN_SWEEP if own_ray else SWEEP),
    )


def trials_at_once(configs: Sequence[LanguageModelSAERunnerConfig]) -> int:
    """Processes of trials: those that come later take the place of those that have ended."""
    scheduled = any(c.scheduler is not None for c in configs)
    return len(configs) if scheduled else min(len(configs), TRIALS_AT_ONCE)


def trainer_memory(
    members: Sequence[LanguageModelSAERunnerConfig],
    threads: int,
    widths: Mapping[str, int],
    on_gpu: bool,
) -> TrainerMemory:
    """What a rank of a pack of these SAEs takes.

    Buffers of a step are one thread's, and there are as many as run at once: of a gradient, two for
    each thread, or one for each lane of a batch and their sum. SAEs of another shape have their
    own. On a GPU SAEs go one after the other, in dense steps on a whole batch at once.
    """
    weights = [sae_bytes(c, widths, on_gpu=True) // COPIED for c in members]
    gradients = activations = 0

    def kind_of(c: LanguageModelSAERunnerConfig) -> tuple[tuple[str, ...], int, str, bool]:
        has_kernels = on_gpu and c.architecture == "standard"
        return (c.hooks_read, c.d_sae(widths[c.hooks_read[0]]), c.dtype, has_kernels)

    shapes = {kind_of(c): c for c in members}
    for (hooks, d_sae, of_weights, has_kernels), c in shapes.items():
        number, rows = DTYPE_BYTES[of_weights], c.train_batch_size
        lanes = -(-rows // LANE_ROWS)
        one = sae_bytes(c, widths, on_gpu=True) // COPIED
        errors = rows * widths[hooks[-1]] * number
        if on_gpu:
            dtype = c.computes_in("cuda")
            gradients += one
            activations += errors
            half = one // 2 if dtype == "bfloat16" else 0  # of weights, as products read them
            if has_kernels and of_weights == "float32" and len(hooks) == 1:
                activations += of_kernels(rows, d_sae, widths[hooks[0]], dtype)
                activations += half * sum(kind_of(m) == kind_of(c) for m in members)  # each has one
            else:
                activations += 3 * rows * d_sae * number + half
            continue
        # As `PackStep` spreads them: an SAE to a thread, and lanes of those that are left over.
        whole = threads if len(members) >= threads else 0
        spread = lanes if len(members) % threads else 0
        gradients += max(2 * whole, spread and spread + 1) * one
        block = max(BLOCK_BYTES, 64 * d_sae * number)
        activations += max(whole, 1) * errors + max(whole, min(threads, spread)) * 3 * block
        activations += max(whole, 1) * (one // 2) // number  # W_enc in eight bits
    c = members[0]
    read = {hook for member in members for hook in member.hooks_read}
    row = sum(widths[hook] for hook in read) * DTYPE_BYTES[c.activation_dtype]
    activations += BATCHES * c.train_batch_size * row
    copies = COPIED * sum(weights)
    return TrainerMemory(
        int(WORKER), sum(weights), 2 * sum(weights), gradients, activations, copies
    )


def of_kernels(n_rows: int, d_sae: int, d_in: int, compute_dtype: str) -> int:
    """Buffers of the step that has kernels of its own (`saeray.sae.gpu`).

    Two [B, L] of the dense one. Of the other a chunk of pre-activations, bits, and lists of as many
    entries as it is taken for, with a quarter to spare.
    """
    block = n_rows * d_sae * (2 if compute_dtype == "bfloat16" else 4)
    entries = n_rows * d_sae * MOST_ACTIVE.get(compute_dtype, 0) * 5 / 4
    bits = n_rows * d_sae * 3 / 8
    return int(2 * block + min(CHUNK_BYTES, block) + bits + entries * (16 + d_in / 8))


def evaluated_together(
    configs: Sequence[LanguageModelSAERunnerConfig], widths: Mapping[str, int], harvesters: int
) -> int:
    """How many of these SAEs a harvester evaluates at once: all harvesters shall have some."""

    def n_bytes(c: LanguageModelSAERunnerConfig) -> int:
        read, written = (widths[c.hooks_read[i]] for i in (0, -1))
        return (read + written) * c.d_sae(read) * DTYPE_BYTES[c.dtype]

    share = -(-len(configs) // harvesters)
    return max(1, min(share, EVALUATED_TOGETHER, SAES_AT_HARVESTER // max(map(n_bytes, configs))))


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

    widths: of activations, by hook point. The gradient is not in it: it is a thread's.
    """
    d_in, d_out = widths[config.hooks_read[0]], widths[config.hooks_read[-1]]
    d_sae = config.d_sae(d_in)
    parameters = (d_in + d_out) * d_sae + d_in + d_sae
    if config.hook_point_out is not None:
        parameters += d_out * (1 + config.skip_connection * d_in)
    numbers = COPIED if on_gpu else 2 * COPIED
    return parameters * numbers * DTYPE_BYTES[config.dtype]


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
            taken[at]["Ray Train"] += memory.of_pack * memory.packs
            taken[at]["trials"] += memory.trials
            taken[at]["the rest"] += memory.rest
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
