"""What the buffer harvests, keeps and releases: its policy, without Ray."""

import random

import pytest

from saeray.spec.order import StreamOrder
from saeray.stream.policy import Policy, ReaderState

ORDER = StreamOrder(n_blocks=40, block_rows=8, group_blocks=4, seed=0)  # 10 windows


def fill(policy):
    """Harvests whatever the policy wants, at once; returns the blocks harvested."""
    done = []
    while (block := policy.next_block()) is not None:
        assert block not in policy.held
        policy.held.add(block)
        policy.ready.add(block)
        done.append(block)
    return done


def release(policy):
    gone = policy.ready - policy.kept()
    policy.ready -= gone
    policy.held -= gone
    return gone


def test_one_reader_gets_every_block_once_in_order_within_the_slots():
    policy = Policy(ORDER, slots=12)
    harvested, most = [], 0
    for window in range(ORDER.n_windows):
        policy.ask("a", window, 0.0)
        release(policy)
        harvested += fill(policy)
        most = max(most, len(policy.held))
        assert set(ORDER.blocks_of(window)) <= policy.ready
    assert harvested == list(range(40))
    assert most == 12


def test_harvesting_stays_ahead_of_the_fastest_reader_as_far_as_slots_reach():
    policy = Policy(ORDER, slots=12)
    policy.ask("a", 0, 0.0)
    assert fill(policy) == list(range(12))
    policy.ask("a", 1, 0.0)  # still needs group 0
    release(policy)
    assert fill(policy) == []
    policy.ask("a", 2, 0.0)
    assert release(policy) == {0, 1, 2, 3}
    assert fill(policy) == [12, 13, 14, 15]


def test_readers_of_one_pace_share_every_block():
    policy = Policy(ORDER, slots=12)
    generator = random.Random(0)
    at = {"a": 0, "b": 0, "c": 0}
    for name in at:
        policy.ask(name, 0, 0.0)
    harvested = fill(policy)
    while any(w < ORDER.n_windows for w in at.values()):
        # A reader moves only when its window is there, as in life.
        able = [n for n, w in at.items() if w < ORDER.n_windows
                and set(ORDER.blocks_of(w)) <= policy.ready]  # fmt: skip
        name = generator.choice(able)
        at[name] += 1
        if at[name] < ORDER.n_windows:
            policy.ask(name, at[name], 0.0)
        else:
            del policy.readers[name]
        release(policy)
        harvested += fill(policy)
        assert len(policy.held) <= 12
    assert harvested == list(range(40))


def test_a_reader_that_is_expected_holds_the_others_back_until_the_limit():
    policy = Policy(ORDER, slots=12)
    policy.readers["late"] = ReaderState(0)
    for window in range(3):
        policy.ask("a", window, 0.0)
        release(policy)
        fill(policy)
    assert policy.held == set(range(12))  # window 2 is there, nothing beyond
    policy.ask("a", 3, 0.0)  # needs group 3, and there is no room
    assert policy.watch_lag(now=0.0, limit=60.0) == []
    assert policy.watch_lag(now=59.0, limit=60.0) == []
    assert policy.watch_lag(now=61.0, limit=60.0) == ["late"]
    release(policy)
    assert set(fill(policy)) == {12, 13, 14, 15}


def test_small_waits_for_one_reader_add_up():
    policy = Policy(ORDER, slots=8)
    detached, now = [], 0.0
    for window in range(8):
        policy.ask("slow", window, now)
        policy.ask("fast", window + 1, now)  # as far as 8 slots reach: one window ahead
        policy.ask("fast", window + 2, now)
        assert policy.watch_lag(now, limit=10.0) == []
        now += 3.0  # the slow one reads, the fast one waits
        detached += policy.watch_lag(now, limit=10.0)
        if detached:
            break
    # 3 s at each of windows 0 to 3: after the fourth it is more than 10.
    assert (detached, window) == (["slow"], 3)


def test_readers_that_share_cores_wait_for_a_slow_one_as_long_as_it_gets_on():
    policy = Policy(ORDER, slots=8, at_a_time=True)
    now = 0.0
    for window in range(8):  # as above
        policy.ask("slow", window, now)
        policy.ask("fast", window + 1, now)
        policy.ask("fast", window + 2, now)
        assert policy.watch_lag(now, limit=10.0) == []
        now += 9.0
        assert policy.watch_lag(now, limit=10.0) == []
    assert policy.watch_lag(now + 2.0, limit=10.0) == ["slow"]  # 11 s at window 7


def test_a_detached_reader_still_gets_every_window_and_the_bound_holds():
    policy = Policy(ORDER, slots=12)
    policy.ask("slow", 0, 0.0)
    policy.readers["slow"].detached = True
    policy.ask("fast", 6, 0.0)
    fill(policy)
    for window in range(6):
        policy.ask("slow", window, float(window))
        policy.readers["slow"].detached = True
        release(policy)
        fill(policy)
        assert set(ORDER.blocks_of(window)) <= policy.ready
        assert set(ORDER.blocks_of(6)) <= policy.ready  # the fast one lost nothing
        assert len(policy.held) <= 12 + ORDER.group_blocks
    policy.ask("slow", 6, 9.0)
    assert not policy.readers["slow"].detached  # caught up


@pytest.mark.parametrize("seed", range(5))
def test_detached_readers_never_wait_for_each_other(seed):
    generator = random.Random(seed)
    policy = Policy(ORDER, slots=8)
    at = {"x": 0, "y": 3, "z": 5, "fast": 8}
    clock = 0.0
    for name, window in at.items():
        policy.ask(name, window, clock)
        policy.readers[name].detached = name != "fast"
    moves = 0
    while at and moves < 500:
        moves, clock = moves + 1, clock + 1
        release(policy)
        fill(policy)
        assert (
            len(policy.held) <= 8 + 2 * ORDER.group_blocks
        )  # 8 is the least, so no group is spare
        served = [n for n in at if policy.has(policy.readers[n])]
        assert served, "nobody can move"
        name = generator.choice(served)
        policy.readers[name].asks_since = None  # it got its window, and reads it
        at[name] += 1
        if at[name] == ORDER.n_windows:
            del policy.readers[name], at[name]
        else:
            policy.ask(name, at[name], clock)
    assert not at
