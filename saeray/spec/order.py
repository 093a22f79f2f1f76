"""The order of the stream: which activation stands at which place, as a pure function of a seed.

The stream is cut into *blocks* (the activations of one LM batch) and blocks into *groups* of half a
buffer. A seeded coin sends half of each group's rows *early*, to window g, and the other half
*late*, to window g + 1; window g is a seeded permutation of late(g - 1) and early(g). So every
window mixes two adjacent groups, which is the guide's half-refilled mixing buffer, and every row is
served exactly once. The last window takes all rows that are left.

Readers gather their batches straight from the two groups' blocks in this order, so the shuffled
rows are never stored a second time.

Only numpy, and of it only Philox's raw bits and a stable sort, both of which numpy promises to
keep: the order stays the same from one numpy to the next.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np


class WindowOrder(NamedTuple):
    """Where the rows of one window come from, in the order they are served."""

    block: np.ndarray  # [n] int32, index in the stream
    row: np.ndarray  # [n] int32, row in that block


class StreamOrder(NamedTuple):
    """Geometry of one stream and its seed."""

    n_blocks: int
    block_rows: int
    group_blocks: int  # blocks in half a buffer
    seed: int

    @classmethod
    def of(
        cls, stream_tokens: int, block_rows: int, n_batches_in_buffer: int, seed: int
    ) -> StreamOrder:
        """The shortest stream with at least `stream_tokens` rows."""
        return cls(-(-stream_tokens // block_rows), block_rows, n_batches_in_buffer // 2, seed)

    @property
    def n_rows(self) -> int:
        return self.n_blocks * self.block_rows

    @property
    def n_windows(self) -> int:
        """As many as there are groups."""
        return -(-self.n_blocks // self.group_blocks)

    def group(self, g: int) -> range:
        """The blocks of group g; the last group may be short."""
        first = g * self.group_blocks
        return range(first, min(first + self.group_blocks, self.n_blocks))

    def blocks_of(self, window: int) -> range:
        """The blocks that must be there to read `window`: groups window - 1 and window."""
        return range(max(0, window - 1) * self.group_blocks, self.group(window).stop)

    def window_start(self, window: int) -> int:
        """Rows served before `window`: all of the earlier groups but the late half of the last."""
        if window == 0:
            return 0
        if window >= self.n_windows:
            return self.n_rows
        before = self.group(window - 1)
        return before.stop * self.block_rows - self.late_rows(window - 1)

    def late_rows(self, g: int) -> int:
        """Rows of group g that wait for window g + 1."""
        rows = len(self.group(g)) * self.block_rows
        return 0 if g == self.n_windows - 1 else rows - rows // 2

    def window_of(self, position: int) -> int:
        """The window that serves row `position` of the stream."""
        window = min(position // (self.group_blocks * self.block_rows), self.n_windows - 1)
        while window + 1 < self.n_windows and self.window_start(window + 1) <= position:
            window += 1
        return window

    def order(self, window: int) -> WindowOrder:
        """The rows of one window in the order they are served."""
        parts = [split(self, window)[0]]
        if window > 0:
            parts.insert(0, split(self, window - 1)[1])
        rows = np.concatenate(parts)  # rows of the stream, counted from its beginning
        rows = rows[permutation(len(rows), self.seed, window, salt=1)]
        return WindowOrder(
            (rows // self.block_rows).astype(np.int32), (rows % self.block_rows).astype(np.int32)
        )


@lru_cache(maxsize=2)
def split(order: StreamOrder, g: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of group g that go early (to window g) and late (to window g + 1)."""
    blocks = order.group(g)
    rows = np.arange(blocks.start * order.block_rows, blocks.stop * order.block_rows)
    mixed = rows[permutation(len(rows), order.seed, g, salt=0)]
    n_early = len(rows) - order.late_rows(g)
    return mixed[:n_early], mixed[n_early:]


def permutation(n: int, seed: int, index: int, salt: int) -> np.ndarray:
    """A permutation of range(n), [n] int64, different for every (seed, index, salt)."""
    bits = np.random.Philox(key=[seed, salt], counter=[0, 0, index, 0]).random_raw(n)
    return np.argsort(bits, kind="stable")
