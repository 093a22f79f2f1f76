"""GPU memory that a sweep takes, and what a node's GPUs have. Plain data.

Ray counts GPUs and not their memory; it does know their kind. What can't fit is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.fitted import Fitted
from saeray.spec.memory import Memory, size
from saeray.spec.plan import DTYPE_BYTES
from saeray.spec.room import Cluster, Room

CONTEXT = 0.6e9  # what CUDA and its libraries take of a GPU, for each process
# Of a forward, in numbers for each token and each of d_in: a block's inputs, its attention's four
# and its MLP's two times four, and what is freed late.
FORWARD = 20
LOGITS_AT_ONCE = 1 << 20  # of an evaluation, or of one window (`saeray.lm.evaluate`)
LOGITS_KEPT = 4  # such blocks, in float32: as the model is, with an SAE, and their logarithms

# The least memory of each kind that Ray tells apart (resources accelerator_type:…), in bytes.
OF_KIND = {
    "K80": 12e9, "P4": 8e9, "P100": 12e9, "V100": 16e9, "T4": 15e9, "A10G": 24e9, "L4": 24e9,
    "L40S": 48e9, "A100": 40e9, "A100-40G": 40e9, "A100-80G": 80e9, "H20": 96e9, "H100": 80e9,
    "H200": 141e9, "B200": 180e9, "GB200": 186e9, "B300": 270e9, "GB300": 279e9,
    "RTX-PRO-6000": 96e9,
}  # fmt: skip
KIND = "accelerator_type:"


class GPUMemory(NamedTuple):
    """Bytes of GPU memory, by process."""

    trainer: int  # a rank of the largest pack
    language_model: int  # a harvester, with the SAEs that it evaluates
    parts: str  # of the trainer's, in words

    def __str__(self) -> str:
        return (
            f"GPU memory: {size(self.trainer)} for a rank of the largest pack ({self.parts}), "
            f"{size(self.language_model)} for a language model"
        )


def gpu_memory_of(
    configs: Sequence[LanguageModelSAERunnerConfig],
    memory: Memory,
    widths: dict[str, int],
    parameter_bytes: int,
    d_vocab: int,
) -> GPUMemory:
    """What SAEs on one stream take of GPUs."""
    c, trainer = configs[0], memory.trainer
    tokens = c.store_batch_size * c.context_size
    forward = FORWARD * tokens * max(widths.values()) * DTYPE_BYTES[c.activation_dtype]
    logits = LOGITS_KEPT * max(LOGITS_AT_ONCE, c.context_size * d_vocab) * 4
    of_model = parameter_bytes + memory.saes_at_harvester + max(forward, logits)
    return GPUMemory(
        int(CONTEXT) + trainer.on_device,
        int(CONTEXT) + of_model,
        f"{trainer}, {size(CONTEXT)} CUDA's own",
    )


def bytes_of_gpu(resources: dict[str, float]) -> float:
    """Of each GPU of a node, as far as Ray says of which kind they are; 0: not known."""
    kinds = [name.removeprefix(KIND) for name, n in resources.items() if name.startswith(KIND) if n]
    return min((OF_KIND.get(kind, 0.0) for kind in kinds), default=0.0)


def check_gpu_memory(
    taken: GPUMemory,
    fitted: Fitted,
    cluster: Cluster,
    harvester_nodes: Sequence[str],
    known: float = 0.0,
) -> None:
    """Refuses what can't fit onto the GPUs of a node, where it is known how large they are.

    known: bytes of each GPU, where somebody has asked it; else by its kind.

    Raises:
        ConfigError: with the numbers, and what would take less.
    """
    room = Room((*cluster.nodes, *cluster.planned))
    index = {node.id: at for at, node in enumerate(room.nodes) if node.id}
    on: dict[int, Counter[str]] = {at: Counter() for at in range(len(room.nodes))}
    roles = []
    if fitted.harvester_gpus:
        for node_id in harvester_nodes:
            if node_id in index:
                room.take(node_id, fitted.harvester)
                on[index[node_id]]["language models"] += taken.language_model
        roles.append(("a language model", taken.language_model, fitted.harvester_gpus))
    if fitted.trainer_gpus:
        for _ in range(fitted.packs * fitted.num_workers):
            free = [dict(f) for f in room.free]
            if room.place(fitted.trainer) is None:
                break
            at = next(i for i, f in enumerate(room.free) if f != free[i])
            on[at]["packs"] += taken.trainer
        roles.append(("a rank of the largest pack", taken.trainer, fitted.trainer_gpus))
    for at, node in enumerate(room.nodes):
        each = known or bytes_of_gpu(dict(node.resources))
        if not each or not on[at]:
            continue
        for who, needs, gpus in roles:
            if needs > each * max(1.0, gpus):
                raise refusal(f"{who} takes {size(needs)}", taken, each, node.name)
        if sum(on[at].values()) > each * node.gpus:
            parts = ", ".join(f"{size(n)} for {what}" for what, n in on[at].most_common())
            raise refusal(f"{size(sum(on[at].values()))} are needed ({parts})", taken, each, node)


def refusal(what: str, taken: GPUMemory, each: float, node: object) -> ConfigError:
    return ConfigError(
        f"GPU memory: {what}, but each GPU of {node} has {size(each)}. {taken}. Put fewer SAEs "
        "into a pack (resources.saes_per_trainer), lower expansion_factor, train_batch_size or "
        "store_batch_size, use activation_dtype: bfloat16, or GPUs that are larger "
        "(resources.trainer_labels)."
    )
