"""Steps of a pack on a GPU, replayed from CUDA graphs.

A step is some fifty kernels. Where an SAE is small, or the host slow, launching them takes longer
than they do: an SAE of 128 to 1,024 features kept a GPU busy for 0.14 ms of every 2.3. So a step is
recorded once and from then on launched as a whole. What it depends on beside tensors, Adam's rates
and the coefficient, is in the GPU's memory (`SAETrainer.numbers`); its batch is copied to where the
graph reads it (`StaticBatch`). The same kernels run on the same values in the same order, so the
bits are those of a step that was not recorded.

Not recorded are steps whose metrics are wanted, steps in which dead features are helped (how many,
the host must know), those of several ranks, and architectures that `SAETrainer.on_gpu` leaves to
torch.

After the last SAE of a pack the host waits, once, and reads of each whether its entries had room
(else the step has changed nothing, and is made again), how many of them were active, and how many
features are dead now.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from saeray.sae.gpu.adam import say_changed
from saeray.sae.gradients import Batch, Gradients
from saeray.sae.trainer import SAETrainer


class Made(NamedTuple):
    """A gradient, of which only the encoder's share in b_dec is missing."""

    total: Gradients
    buffers: tuple[Any, ...]  # that it was made in, as a graph of it does whenever it is replayed
    capacity: int  # of those; a graph is of no use any more when another one is wanted


class Steps(Protocol):
    """Who makes steps: `pack_step.PackStep`. sparse: from active entries alone."""

    sparse: bool

    def sums_to_record(self, t: SAETrainer, batch: Batch, sparse: bool) -> Made: ...

    def room_on_gpu(self, t: SAETrainer, batch: Batch, sparse: bool) -> int:
        """The capacity of what `sums_to_record` would be made in now."""


class StaticBatch:
    """A batch in a place that stays; several SAEs' graphs may read it."""

    def __init__(self, batch: Batch) -> None:
        x, normaliser, scale = batch.x.clone(), batch.normaliser.clone(), batch.scale.clone()
        self.batch = Batch(x, x, normaliser, scale, batch.weight)
        self.holds: Batch | None = None  # until the end of the step

    def fill(self, batch: Batch) -> bool:
        """False if it holds another one in this step."""
        if self.holds is not None:
            return self.holds is batch
        self.holds = batch
        self.batch.x.copy_(batch.x)
        self.batch.normaliser.copy_(batch.normaliser)
        self.batch.scale.copy_(batch.scale)
        return True

    def fits(self, batch: Batch) -> bool:
        return self.batch.x.shape == batch.x.shape and self.batch.weight == batch.weight


class Place(NamedTuple):
    """Where the graphs of one pack are recorded; others' would free what cuBLAS works in."""

    pool: Any = None
    stream: Any = None

    @classmethod
    def on(cls, device: torch.device) -> Place:
        if device.type != "cuda":
            return cls()
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))


class Recorded:
    """One SAE's step, dense or from active entries."""

    def __init__(
        self, t: SAETrainer, static: StaticBatch, steps: Steps, sparse: bool, place: Place
    ) -> None:
        self.static, self.n_rows = static, len(static.batch.x)
        device = t.sae.W_enc.device
        pinned = device.type == "cuda"
        self.numbers = torch.zeros(3, pin_memory=pinned)
        # What the host wants to know: valid or not, entries that were active, dead features.
        self.said = torch.zeros(3, dtype=torch.int64, pin_memory=pinned)
        self.on_device = torch.zeros(3, dtype=torch.int64, device=device)
        self.made: Made | None = None
        if t.half is not None:
            t.half.refresh(t.sae)  # or that would be recorded too
        self.launch = record(partial(self.step, t, steps, sparse), place)

    def step(self, t: SAETrainer, steps: Steps, sparse: bool) -> None:
        t.numbers.copy_(self.numbers, non_blocking=True)
        t.tell_rule(self.n_rows)
        self.made = steps.sums_to_record(t, self.static.batch, sparse)
        total = self.made.total
        total.b_dec.sub_(total.b_enc @ t.sae.W_enc.t())
        t.rule.finish_gradient(total)
        t.update(total)
        self.on_device[0].copy_(total.valid[0])
        self.on_device[1].copy_(total.fired.sum())
        if t.rule.remedy is not None:
            self.on_device[2].copy_(t.dead.sum())
        self.said.copy_(self.on_device, non_blocking=True)

    def replay(self, t: SAETrainer) -> None:
        self.numbers.copy_(torch.tensor(t.numbers_of_step(self.n_rows)))
        if t.half is not None:
            t.half.refresh(t.sae)  # if anything but Adam has changed the weights
        self.launch()
        say_changed(t.sae, t.half)


def record(step: Callable[[], None], place: Place) -> Callable[[], None]:
    """What launches all that `step` would; it is not done now.

    Raises:
        RuntimeError: it can't be, for whatever CUDA says; no memory, for one.
    """
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    collects = gc.isenabled()
    gc.disable()  # an old graph that is collected while another one is recorded ends the process
    try:
        # The reader's thread pins memory meanwhile, which is nothing to this one.
        with torch.cuda.graph(
            graph, pool=place.pool, stream=place.stream, capture_error_mode="thread_local"
        ):
            step()
    finally:
        torch.cuda.set_stream(before)  # which a recording that fails does not
        if collects:
            gc.enable()
    return graph.replay


class RecordedSteps:
    """The steps of a pack's SAEs that are recorded."""

    def __init__(self) -> None:
        self.place: Place | None = None
        self.works = True
        self.batches: list[StaticBatch] = []
        # By whether it is sparse, and how many rows it is on.
        self.recorded: weakref.WeakKeyDictionary[
            SAETrainer, dict[tuple[bool, int], Recorded | None]
        ] = weakref.WeakKeyDictionary()
        # The step before which no feature is dead, if that was the last one to be replayed.
        self.none_dead_at: weakref.WeakKeyDictionary[SAETrainer, int] = weakref.WeakKeyDictionary()
        self.underway: list[tuple[SAETrainer, Recorded]] = []

    def enqueue(self, t: SAETrainer, batch: Batch, steps: Steps) -> bool:
        """A step of this SAE, if it can be replayed; `finish` ends it."""
        if not (t.on_gpu and self.works):
            return False
        t.decide()
        sparse = steps.sparse and t.is_sparse_on(len(batch.x))
        kind, known = (sparse, len(batch.x)), self.recorded.setdefault(t, {})
        if kind not in known:  # its first one compiles kernels and makes buffers
            known[kind] = None
            return False
        if t.rule.remedy is not None and self.none_dead_at.get(t) != t.step and bool(t.dead.any()):
            return False
        recorded = known[kind]
        made = None if recorded is None else recorded.made
        if made is not None and made.capacity != steps.room_on_gpu(t, batch, sparse):
            recorded = None  # this SAE or another one needed more
        if recorded is None or not recorded.static.fill(batch):
            # The old one goes when the new one is there: a pool without a graph can't be used.
            recorded = known[kind] = self.record(t, batch, sparse, steps)
        if recorded is None:
            return False
        recorded.replay(t)
        self.underway.append((t, recorded))
        return True

    def record(self, t: SAETrainer, batch: Batch, sparse: bool, steps: Steps) -> Recorded | None:
        """None where it is not possible; then no other one is tried."""
        try:
            if self.place is None:
                self.place = Place.on(t.sae.device)
            return Recorded(t, self.static(batch), steps, sparse, self.place)
        except RuntimeError as error:  # torch's own and CUDA's are
            self.works = False
            self.recorded.clear()  # those underway are held by that
            self.batches.clear()
            warnings.warn(
                f"CUDA graphs can't be used, so steps of small SAEs take longer: {error}",
                stacklevel=2,
            )
            return None

    def static(self, batch: Batch) -> StaticBatch:
        """One that holds this batch."""
        for static in self.batches:
            if static.fits(batch) and static.fill(batch):
                return static
        self.batches.append(StaticBatch(batch))
        assert self.batches[-1].fill(batch)
        return self.batches[-1]

    def finish(self) -> list[SAETrainer]:
        """Waits for all that were enqueued; returns those that have not been stepped after all."""
        if not self.underway:
            return []
        device = self.underway[0][0].sae.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        again = []
        for t, recorded in self.underway:
            valid, n_active, n_dead = recorded.said.tolist()
            if not valid:  # made again, with more room, it will be recorded again
                again.append(t)
                continue
            t.close_step(recorded.n_rows, partial(float, n_active))
            if n_dead == 0:
                self.none_dead_at[t] = t.step
        self.underway.clear()
        for static in self.batches:
            static.holds = None
        return again
