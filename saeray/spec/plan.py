"""What a sweep will need, computed before anything starts: packs, memory, tokens, steps.

Plain data: nothing here knows of Ray. Which node does what is `saeray.spec.placement`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig, stream_key
from saeray.spec.grid import SAE
from saeray.spec.order import StreamOrder
from saeray.spec.placement import Store
from saeray.spec.stream import rows_said
from saeray.spec.synthetic import is_synthetic

DTYPE_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class StreamPlan(NamedTuple):
    """One LM pass."""

    order: StreamOrder
    hook_points: list[str]
    block_bytes: int  # of one block at all hook points
    slots: int  # blocks the buffer may hold

    @property
    def buffer_bytes(self) -> int:
        return self.block_bytes * self.slots


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


def check_fits(plan: StreamPlan, store: Store) -> int:
    """Refuses a buffer that the object store can't hold; how many blocks it could hold.

    store: of the harvesters' nodes, where the blocks lie (`placement.store_of`).

    Raises:
        ConfigError: with the numbers.
    """
    limit = store.usable
    if plan.buffer_bytes > limit:
        group = plan.order.group_blocks * plan.block_bytes
        others = f" beside {store.held:,} of other streams" if store.held else ""
        raise ConfigError(
            f"n_batches_in_buffer: the buffer takes {plan.buffer_bytes:,} bytes ({plan.slots} "
            f"blocks of {plan.block_bytes:,}), but the object store has "
            f"{store.total:,}, of which {limit:,} may be used{others}. Lower "
            "n_batches_in_buffer or store_batch_size, use activation_dtype: bfloat16, set "
            f"buffer_bytes (at least {2 * group:,}), or give Ray a larger object store."
        )
    return limit // plan.block_bytes


def kinds_of(saes: Sequence[SAE]) -> list[list[SAE]]:
    """SAEs that may train together from one reader, wherever their hook points are."""
    by_key: dict[tuple[object, ...], list[SAE]] = {}
    for sae in saes:
        c = sae.config
        by_key.setdefault((stream_key(c), c.train_batch_size, c.wait_limit_s), []).append(sae)
    return list(by_key.values())


def cut_packs(saes: Sequence[SAE], per_pack: int) -> list[list[SAE]]:
    """Packs of at most `per_pack`, of SAEs that may train together, as even as can be.

    Those at one hook point are kept together: a pack reads the blocks of as few as there can be.
    """
    packs = []
    for members in kinds_of(saes):
        members.sort(key=lambda sae: sae.config.hooks_read)
        n = -(-len(members) // per_pack)
        sizes = [len(members) // n + (i < len(members) % n) for i in range(n)]
        at = 0
        for size in sizes:
            packs.append(members[at : at + size])
            at += size
    return packs


def hook_points_of(configs: Iterable[LanguageModelSAERunnerConfig]) -> list[str]:
    """The hook points of SAEs on one stream, each once."""
    return sorted({hook for c in configs for hook in c.hooks_read})


def by_stream(saes: Sequence[SAE]) -> dict[str, list[SAE]]:
    """The SAEs of each activation stream, by its key."""
    streams: dict[str, list[SAE]] = {}
    for sae in saes:
        streams.setdefault(stream_key(sae.config), []).append(sae)
    return streams


def lr_said(sae: SAE) -> str:
    """The lr, where the name does not say it, as of lr: auto."""
    of_lr = re.search(r"(?:^|,)lr=([^,]+)", sae.name)
    return "" if of_lr and of_lr[1] != "auto" else f", lr {sae.config.lr:.4g}"


def describe(saes: Sequence[SAE]) -> str:
    """The plan of a sweep in words, for --dry-run."""
    streams = by_stream(saes)
    lines = [f"{len(saes)} SAEs on {len(streams)} activation stream(s)"]
    for members in streams.values():
        c = members[0].config
        hooks = hook_points_of(m.config for m in members)
        what = "rows" if is_synthetic(c.model_name) else "LM tokens"
        assert c.stream_tokens is not None and c.data_seed is not None
        order = StreamOrder.of(c.stream_tokens, c.block_rows, c.n_batches_in_buffer, c.data_seed)
        said = rows_said(c)
        lines.append(
            f"  {c.model_name} at {', '.join(hooks)}: {order.n_rows:,} "
            f"{'rows' if said is not None else what} in "
            f"{order.n_blocks} blocks of {order.block_rows:,}; buffer of {c.n_batches_in_buffer} "
            f"blocks ({c.n_batches_in_buffer * c.block_rows:,} activations)"
        )
        if said is not None:
            lines.append(f"    {said}")
        lines += [f"    {m.name}: {m.config.steps:,} steps{lr_said(m)}" for m in members]
    scheduler = saes[0].config.scheduler
    if scheduler is not None:
        lines.append(f"  scheduler: {scheduler.described(saes[0].config)}")
    return "\n".join(lines)
