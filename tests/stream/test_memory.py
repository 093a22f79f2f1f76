"""What the activation buffer holds, in bytes of the object store, on a Ray with a small one."""

import os
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import ray
import torch

from saeray.client.connect import end_ray
from saeray.spec.order import StreamOrder
from saeray.spec.placement import STORE_SHARE
from saeray.stream.buffer import ActivationBuffer
from saeray.stream.harvester import Harvested
from saeray.stream.reader import Place, Reader

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS, D = 2048, 128
BLOCK_BYTES = ROWS * D * 4  # 1 MiB
STORE = 80 * 2**20  # little more than the least Ray takes


@pytest.fixture(scope="module")
def small_store():
    """A Ray whose object store holds 80 MiB."""
    assert not ray.is_initialized()
    os.environ["RAY_task_events_report_interval_ms"] = "0"  # noqa: SIM112 (as `start_ray` does)
    ray.init(
        num_cpus=2,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        namespace="saeray",
    )
    yield
    end_ray()


def store():
    """(bytes in use, bytes ever spilled) of the object store."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    stats = get_memory_info_reply(state).store_stats
    return stats.object_store_bytes_used, stats.spilled_bytes_total


class Tokens:
    def block(self, index):
        return np.full((2, 16), index, dtype=np.int32)


class Rows:
    """A fake language model: block b holds b everywhere."""

    def ping(self):
        pass

    def harvest(self, index, tokens, cache=None):
        rows = np.full((ROWS, D), float(index), dtype=np.float32)
        return Harvested(index, tokens.size, 0.0), rows


class Consumer:
    """A trainer that only looks: reads the whole stream and notes when it got how far."""

    def read(self, buffer, name, order, seconds_per_batch):
        torch.set_num_threads(1)
        place = Place(name, {0: D}, order, torch.float32, batch_rows=ROWS)
        reader = Reader(
            buffer,
            place,
            first_batch=0,
            n_batches=order.n_blocks,
            device=torch.device("cpu"),
            wait_limit_s=60.0,
        )
        sums, times = [], []
        for batch in reader:
            sums.append(float(batch[0][:, 0].double().sum()))
            times.append(time.time())
            time.sleep(seconds_per_batch)
        reader.close()
        return sums, times

    def pid(self):
        return os.getpid()


@pytest.fixture
def actors():
    made = []

    def make(cls, *args, **options):
        made.append(ray.remote(cls).options(num_cpus=0, **options).remote(*args))
        return made[-1]

    def buffer(order, slots, lag_s, room):
        return make(
            Configured, order, slots, make(Tokens), [make(Rows), make(Rows)], lag_s, room,
            max_concurrency=100,
        )  # fmt: skip

    yield make, buffer
    for a in made:
        ray.kill(a)


class Configured(ActivationBuffer):
    """With its settings as positional arguments, for `make`."""

    def __init__(self, order, slots, tokens, harvesters, lag_s, room):
        super().__init__(order, slots, ["hook"], tokens, harvesters, lag_s=lag_s, room=room)


def wait_until_empty(limit=30.0):
    deadline = time.monotonic() + limit
    while store()[0] > BLOCK_BYTES and time.monotonic() < deadline:
        time.sleep(0.5)
    return store()[0]


@pytest.mark.slow
def test_one_reader_ten_times_slower(small_store, actors):
    make, buffer = actors
    order = StreamOrder(n_blocks=120, block_rows=ROWS, group_blocks=6, seed=1)
    slots, lag = 24, 3.0
    window = 2 * order.group_blocks
    b = buffer(order, slots, lag, room=slots + window)
    readers = {name: make(Consumer) for name in ("fast-1", "fast-2", "slow")}
    ray.get([r.pid.remote() for r in readers.values()])
    ray.get([b.expect.remote(name, 0) for name in readers])
    runs = {
        name: r.read.remote(b, name, order, 0.25 if name == "slow" else 0.025)
        for name, r in readers.items()
    }
    used = []
    while len(ray.wait(list(runs.values()), num_returns=3, timeout=0.1)[0]) < 3:
        used.append(store()[0])
    # What is configured, and a window more: while the slow one is served on its own.
    assert max(used) <= (slots + window) * BLOCK_BYTES
    assert max(used) > slots * BLOCK_BYTES / 2  # the samples did see it full
    read = {name: ray.get(run) for name, run in runs.items()}
    # Every row once and in the same order for all: the batches' sums say so.
    assert read["slow"][0] == read["fast-1"][0] == read["fast-2"][0]
    assert sum(read["slow"][0]) == sum(range(order.n_blocks)) * ROWS
    # The fast ones were not held to its pace: when they were through, it was further behind than
    # all that the buffer holds.
    through = read["fast-1"][1][-1]
    assert sum(t < through for t in read["slow"][1]) < order.n_blocks - slots
    assert ray.get(b.gauges.remote()).detached == ["slow"]


def test_a_store_just_above_the_minimum_is_not_spilled(small_store, actors):
    make, buffer = actors
    assert wait_until_empty() <= BLOCK_BYTES
    _, spilled = store()
    n = 20  # half of a buffer of 40 blocks; three of them fill all of the store that is allowed
    order = StreamOrder(n_blocks=160, block_rows=ROWS, group_blocks=n, seed=1)
    room = int(STORE_SHARE * STORE) // BLOCK_BYTES
    assert room == 3 * n
    b = buffer(order, 3 * n, 60.0, room)
    runs = [make(Consumer).read.remote(b, f"r{i}", order, 0.0) for i in range(2)]
    used = []
    while len(ray.wait(runs, num_returns=2, timeout=0.1)[0]) < 2:
        used.append(store()[0])
    assert ray.get(runs[0])[0] == ray.get(runs[1])[0]
    assert max(used) > 0.7 * 3 * n * BLOCK_BYTES
    assert store()[1] == spilled


@pytest.mark.slow
def test_soak_of_3000_blocks_does_not_grow(small_store, actors, capsys):
    """The memory of every process over 3,600 blocks of 1 MiB, and its slope."""
    make, buffer = actors
    order = StreamOrder(n_blocks=3600, block_rows=ROWS, group_blocks=6, seed=1)
    b = buffer(order, 18, 60.0, int(STORE_SHARE * STORE) // BLOCK_BYTES)
    readers = [make(Consumer) for _ in range(2)]
    runs = [r.read.remote(b, f"r{i}", order, 0.0) for i, r in enumerate(readers)]
    family = psutil.Process().children(recursive=True)
    samples = []  # (blocks harvested, {pid: bytes that are its own})
    stop = threading.Event()
    while len(ray.wait(runs, num_returns=2, timeout=2.0)[0]) < 2 and not stop.is_set():
        memory = {}
        for p in family:
            try:
                info = p.memory_info()
                memory[p.pid, p.name()] = info.rss - info.shared
            except psutil.Error:
                continue
        samples.append((ray.get(b.gauges.remote()).harvested_tokens // 32, memory))
    ray.get(runs)
    settled = [s for s in samples if s[0] > 600]  # after the first mappings and caches
    slopes = {}
    for process in settled[0][1]:
        blocks = np.array([n for n, m in settled if process in m], dtype=float)
        own = np.array([m[process] for _, m in settled if process in m], dtype=float)
        if len(own) > len(settled) / 2:
            slopes[process] = float(np.polyfit(blocks, own, 1)[0])
    with capsys.disabled():
        print(f"\nbytes per block over {len(settled)} samples, the largest:", {
            name: round(s) for (_, name), s in sorted(slopes.items(), key=lambda i: -i[1])[:4]
        })  # fmt: skip
    # 1 KiB a block would be 1 GiB in a million of them, a thousandth of what passed through.
    assert all(s < 2048 for s in slopes.values()), slopes
