"""Reader: the buffer as an iterator of batches on the trainer's device.

A thread asks the buffer for one window after the other and gathers batches from the window's blocks
in the stream's order: the same rows at every hook point that its pack reads. The blocks are read
where they lie in shared memory; a batch is always a copy of its own, since writing to a block would
silently change it for every other reader.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError
from torch import Tensor

from saeray.actors import waiting
from saeray.errors import Late
from saeray.spec.messages import ReaderGauges
from saeray.spec.order import StreamOrder
from saeray.stream.arrays import to_tensor
from saeray.stream.buffer import WindowBlocks

AHEAD = 2  # batches gathered before they are asked for

AtHooks = dict[int, Tensor]  # [rows, d_in] at hook points, by their places among the stream's


class Place(NamedTuple):
    """What a reader reads."""

    name: str
    widths: dict[int, int]  # d_in at each hook point it reads, by its place among the stream's
    order: StreamOrder
    dtype: torch.dtype  # of the activations
    batch_rows: int


class Reader:
    """Iterates over batches, [batch_rows, d_in] at each hook point, to the stream's end.

    The position is a number of batches, so resuming is starting at another number. The last rows of
    the stream that do not fill a batch are left out.
    """

    def __init__(
        self,
        buffer: Any,
        place: Place,
        *,
        first_batch: int,
        n_batches: int,
        device: torch.device,
        wait_limit_s: float,
    ) -> None:
        self.buffer = buffer
        self.place = place
        self.wanted = set(place.widths)  # hook points of the batches to come; may shrink
        self.first_batch = first_batch
        self.n_batches = n_batches
        self.device = device
        self.wait_limit_s = wait_limit_s
        self.queue: queue.Queue[AtHooks | Exception | None] = queue.Queue(maxsize=AHEAD)
        self.stopped = threading.Event()
        self.waited = 0.0  # since the first batch came
        self.started: float | None = None  # when it did
        self.thread = threading.Thread(target=self.run, name="reader", daemon=True)
        self.thread.start()

    def __iter__(self) -> Iterator[AtHooks]:
        while True:
            started = time.perf_counter()
            item = self.queue.get()  # the thread limits its own waits and passes errors on
            now = time.perf_counter()
            if self.started is None:
                self.started = now
            else:
                self.waited += now - started
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            on_gpu = self.device.type == "cuda"
            yield {h: x.to(self.device, non_blocking=on_gpu) for h, x in item.items()}

    def gauges(self) -> ReaderGauges:
        elapsed = 0.0 if self.started is None else time.perf_counter() - self.started
        return ReaderGauges(self.waited, elapsed - self.waited)

    def close(self) -> None:
        """Tells the buffer that nothing is needed for this reader any more."""
        self.stopped.set()
        while not self.queue.empty():
            self.queue.get_nowait()
        self.thread.join(timeout=self.wait_limit_s)
        with contextlib.suppress(ray.exceptions.RayError):  # gone, and with it what it kept for us
            waiting.ask(
                lambda: self.buffer.leave.remote(self.place.name),
                self.wait_limit_s,
                "activation buffer",
            )

    # --- the thread -------------------------------------------------------------------------

    def run(self) -> None:
        try:
            for batch in self.batches():
                self.put(batch)
                if self.stopped.is_set():
                    return
            self.put(None)
        except Exception as error:
            self.put(error)

    def put(self, item: AtHooks | Exception | None) -> None:
        while not self.stopped.is_set():
            try:
                self.queue.put(item, timeout=0.5)
                return
            except queue.Full:
                continue

    def batches(self) -> Iterator[AtHooks]:
        place, order = self.place, self.place.order
        rows = place.batch_rows
        position, end = self.first_batch * rows, (self.first_batch + self.n_batches) * rows
        window = Window(self, order.window_of(position))
        while position < end:
            batch = self.new_batch(rows)
            a, stop = position, position + rows  # rows of the stream
            while a < stop:
                while a >= window.stop:
                    next_window, kept = window.index + 1, window.blocks_of_next()
                    del window  # its other blocks must be gone before the next ones are asked for
                    window = Window(self, next_window, kept)
                b = min(stop, window.stop)
                window.gather(a, b, {h: x[a - position : b - position] for h, x in batch.items()})
                a = b
            yield batch
            position = stop

    def new_batch(self, rows: int) -> AtHooks:
        pinned = self.device.type == "cuda"
        return {
            hook: torch.empty(rows, d_in, dtype=self.place.dtype, pin_memory=pinned)
            for hook, d_in in self.place.widths.items()
            if hook in self.wanted
        }


def is_lost(ref: Any) -> bool:
    """Whether an object is gone for good (one that only takes long to fetch is not)."""
    try:
        ray.get(ref, timeout=1.0)
    except ObjectLostError:
        return True
    except GetTimeoutError:
        pass
    return False


class Window:
    """One window's blocks, mapped from shared memory, and the order to read them in."""

    def __init__(self, reader: Reader, index: int, kept: list[AtHooks] | None = None) -> None:
        """kept: of the window before, what belongs to this one too; taken over from the caller."""
        place = reader.place
        self.index = index
        self.start = place.order.window_start(index)
        self.stop = place.order.window_start(index + 1)
        self.own = len(place.order.group(index))
        self.blocks: list[AtHooks] = [] if kept is None else kept
        answer, arrays = self.fetch(reader)
        self.first_block = answer.blocks.start
        each = [to_tensor(a, place.dtype) for a in arrays]
        n_hooks = len(place.widths)
        self.blocks += [
            dict(zip(place.widths, each[i : i + n_hooks], strict=True))
            for i in range(0, len(each), n_hooks)
        ]
        self.order = place.order.order(index)

    def blocks_of_next(self) -> list[AtHooks]:
        """Takes out the blocks that the next window needs too: those of this one's own group."""
        kept = self.blocks[len(self.blocks) - self.own :]
        self.blocks = []
        return kept

    def fetch(self, reader: Reader) -> tuple[WindowBlocks, list[np.ndarray]]:
        """Those of the window's blocks that are not here, however often they are lost on the way.

        Of each block an array for each hook point, in the order of `Place.widths`.

        Raises:
            Late: not within the limit; names who is waited for.
        """
        place, limit = reader.place, reader.wait_limit_s
        deadline = time.monotonic() + limit
        lost: list[str] = []

        def ask() -> Any:
            return reader.buffer.window.remote(place.name, self.index, lost, len(self.blocks))

        def not_yet(answer: waiting.NotYet) -> None:
            if answer.let_go:
                self.blocks.clear()

        while True:
            answer = waiting.poll(ask, limit, "activation buffer", not_yet)
            refs = [of_block[hook] for of_block in answer.refs for hook in place.widths]
            try:
                return answer, waiting.get(refs, limit, "object store")
            except ObjectLostError:  # with their node, or with the buffer, which owned them
                if time.monotonic() > deadline:
                    raise Late(
                        f"blocks of window {self.index} were lost again and again for {limit:g} s "
                        "(wait_limit_s)."
                    ) from None
                lost = [ref.hex() for ref in refs if is_lost(ref)]

    def gather(self, a: int, b: int, out: AtHooks) -> None:
        """Rows a … b - 1 of the stream into each out [b - a, d_in]."""
        block = self.order.block[a - self.start : b - self.start]
        row = self.order.row[a - self.start : b - self.start]
        by_block = np.argsort(block, kind="stable")  # where each row goes, block after block
        ends = np.searchsorted(block[by_block], np.arange(len(self.blocks) + 1) + self.first_block)
        to = torch.from_numpy(by_block)
        rows = torch.from_numpy(row[by_block].astype(np.int64))
        for i, source in enumerate(self.blocks):
            first, last = int(ends[i]), int(ends[i + 1])
            if first < last:
                for hook, x in out.items():
                    chosen = source[hook].index_select(0, rows[first:last])
                    x.index_copy_(0, to[first:last], chosen)
