"""Reader and buffer on real Ray, with a harvester whose activations say where they come from."""

import asyncio
import sys

import numpy as np
import pytest
import ray
import torch

from saeray.errors import Late, SaerayError
from saeray.spec.order import StreamOrder
from saeray.stream.buffer import ActivationBuffer
from saeray.stream.harvester import Harvested
from saeray.stream.reader import AHEAD, Place, Reader
from saeray.stream.users import Users

# Workers can't import a test module: its classes travel whole.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

ORDER = StreamOrder(n_blocks=11, block_rows=32, group_blocks=2, seed=3)
D = 4


class Tokens:
    def block(self, index):
        return np.full((2, 16), index, dtype=np.int32)


class Rows:
    """Row r of block b is b * 32 + r in every column; the second hook point has it negative."""

    def __init__(self, broken=False):
        self.broken = broken

    def ping(self):
        pass

    def harvest(self, index, tokens, cache=None):
        if self.broken:
            import time

            time.sleep(60)
        assert (tokens == index).all()
        rows = (np.arange(32, dtype=np.float32) + 32 * index)[:, None].repeat(D, axis=1)
        return Harvested(index, tokens.size, 0.0), rows, -rows


@pytest.fixture
def stream(ray_instance):
    made = []

    def make(slots=6, n_harvesters=2, broken=False):
        def actor(cls, *args, **options):
            made.append(ray.remote(cls).options(num_cpus=0, **options).remote(*args))
            return made[-1]

        harvesters = [actor(Rows, broken) for _ in range(n_harvesters)]
        return actor(
            ActivationBuffer, ORDER, slots, ["one", "two"], actor(Tokens), harvesters,
            max_concurrency=100,
        )  # fmt: skip

    yield make
    for a in made:
        ray.kill(a)


def reader(buffer, name="a", hooks=(0,), first_batch=0, n_batches=7, limit=30.0):
    place = Place(name, dict.fromkeys(hooks, D), ORDER, torch.float32, batch_rows=48)
    return Reader(
        buffer,
        place,
        first_batch=first_batch,
        n_batches=n_batches,
        device=torch.device("cpu"),
        wait_limit_s=limit,
    )


def rows_of(reader, hook=0):
    """All it yields of one hook point."""
    return torch.cat([batch[hook] for batch in reader])


def expected(n):
    rows = [ORDER.order(w) for w in range(ORDER.n_windows)]
    return np.concatenate([o.block.astype(np.int64) * 32 + o.row for o in rows])[:n]


def test_batches_are_the_streams_rows_in_its_order(stream):
    r = reader(stream())
    got = rows_of(r)  # 7 batches of 48 rows, over windows of 32 and 64
    r.close()
    assert got.shape == (336, D)
    assert np.array_equal(got[:, 0].numpy(), expected(336))
    assert torch.equal(got[:, 0], got[:, 3])


def test_a_reader_can_start_anywhere_and_at_another_hook_point(stream):
    buffer = stream()
    first, second = reader(buffer), reader(buffer, "b", hooks=[1], first_batch=3, n_batches=4)
    whole, late = rows_of(first), rows_of(second, hook=1)
    first.close()
    second.close()
    assert torch.equal(late, -whole[3 * 48 :])
    # Both were served from one harvest of each block.
    assert ray.get(buffer.gauges.remote()).harvested_tokens == 11 * 32


def test_a_reader_of_two_hook_points_gets_the_same_rows_of_both(stream):
    """In one harvest, from where it starts, and of those only that anyone still wants."""
    buffer = stream()
    both = reader(buffer, hooks=(0, 1), first_batch=2, n_batches=5)
    got = list(both)
    both.close()
    assert [sorted(batch) for batch in got] == [[0, 1]] * 5
    assert np.array_equal(torch.cat([b[0] for b in got])[:, 0].numpy(), expected(336)[2 * 48 :])
    assert all(torch.equal(b[1], -b[0]) for b in got)
    assert ray.get(buffer.gauges.remote()).harvested_tokens <= 11 * 32

    less = reader(buffer, "b", hooks=(0, 1))
    batches = iter(less)
    assert sorted(next(batches)) == [0, 1]
    less.wanted = {1}
    rest = list(batches)
    less.close()
    # AHEAD in the queue, one on its way into it, and one being gathered were begun before.
    assert all(sorted(batch) == [1] for batch in rest[AHEAD + 2 :])
    assert np.array_equal(-torch.cat([b[1] for b in rest])[:, 0].numpy(), expected(336)[48:])


def test_writing_to_a_batch_does_not_change_the_block_for_others(stream):
    buffer = stream()
    vandal, other = reader(buffer), reader(buffer, "b")
    got = []
    for spoilt, batch in zip(vandal, other, strict=True):
        # As soon as it is there; what `other` reads next lies in the same blocks.
        spoilt[0].fill_(-1)
        got.append(batch[0])
    got = torch.cat(got)
    vandal.close()
    other.close()
    assert np.array_equal(got[:, 0].numpy(), expected(336))


def test_the_object_store_is_given_back(stream):
    buffer = stream(slots=4)
    r = reader(buffer)
    for _ in r:
        assert ray.get(buffer.gauges.remote()).used <= 4
    r.close()
    assert ray.get(buffer.gauges.remote()).used == 0


def test_a_harvester_that_hangs_is_named_within_the_limit(stream):
    r = reader(stream(broken=True), limit=8.0)
    with pytest.raises(
        Late, match=r"harvester \d \(block \d, for \d+ s\) for 8 s \(wait_limit_s\)"
    ):
        next(iter(r))


def test_who_waits_for_a_slow_reader_waits_until_that_one_is_detached():
    buffer = ActivationBuffer(ORDER, 4, ["one"], None, [None])
    for name, window in (("slow", 0), ("fast", 3)):
        buffer.policy.ask(name, window, 0.0)
    answer = buffer.not_yet(ORDER.blocks_of(3))
    assert (
        answer.late == "slower readers, which hold the buffer: slow at window 0, fast at window 3"
    )
    assert answer.progress > 0  # which is what the reader's own limit counts from
    buffer.policy.readers["slow"].detached = True
    assert buffer.not_yet(ORDER.blocks_of(3)).progress == 0


def test_what_packs_hold_that_nobody_knows_of_any_more_is_given_back():
    def buffer(shared):
        made = ActivationBuffer(ORDER, 4, ["one"], None, [None])
        if shared:
            made.users = Users(give_up=made.let_go, close=made.close)
            for reader in ("pack-001-old", "pack-002-old"):
                made.users.reads("mine", reader)
            made.users.reads("theirs", "pack-9-their")
        for name in (
            "pack-001-old",
            "pack-002-old",
            "pack-002-old/1",
            "mean at one",
            "pack-9-their",
        ):
            made.policy.ask(name, 0, 0.0)
        return made

    async def left(made):
        await made.keep_only(["pack-001-old"], "mine")
        with pytest.raises(SaerayError, match="pack-002-old was given up"):
            await made.window("pack-002-old", 0)  # what may be left of its process
        return set(made.policy.readers)

    assert asyncio.run(left(buffer(shared=False))) == {"pack-001-old", "mean at one"}
    # The rank that came by itself is nobody's: it is detached in time.
    others = {"pack-002-old/1", "pack-9-their"}
    assert asyncio.run(left(buffer(shared=True))) == {"pack-001-old", "mean at one"} | others


def test_its_time_counts_from_the_first_batch_on(stream):
    """What it waits for before is the sweep's start, which has an account of its own."""
    r = reader(stream())
    assert r.gauges() == (0.0, 0.0, 0.0)
    batches = iter(r)
    next(batches)
    assert r.gauges().waited_seconds == 0.0
    assert r.gauges().busy_seconds > 0.0
    next(batches)
    assert r.gauges().waited_seconds > 0.0
    r.close()
