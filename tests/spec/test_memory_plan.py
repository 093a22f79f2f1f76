"""What a sweep takes of main memory, with the arithmetic, and what is refused."""

import pytest
from support.bundled import HOOK
from support.configs import config

from saeray.errors import ConfigError
from saeray.spec.memory import (
    HARVESTER,
    OWN_SWEEP,
    PACK,
    SAES_AT_HARVESTER,
    SWEEP,
    TRIAL,
    WORKER,
    check_memory,
    fit_saes,
    memory_of,
    sae_bytes,
)
from saeray.spec.placement import fit
from saeray.spec.resources import Resources
from saeray.spec.room import HEAD, Cluster, Node

GB = 10**9
ASHA = {"name": "asha", "metric": "CE_loss_score"}

AS_BYTES = 16_009_000 * 3 * 4  # one SAE's checkpoint, as it is written
GRADIENT = 16_009_000 * 4
IN_EIGHT_BITS = 16_009_000 // 2  # the encoder's weights
BLOCKS = 3 * 2**21  # of a thread: three of 2 MiB, in which 64 rows of 8,000 have room


def rows(n, times):
    """Batches of n rows of 1,000."""
    return n * 1000 * 4 * times


def rank(n_saes, threads=2, gradients=4, batch=4096):
    """A process, its SAEs (six numbers a parameter), gradients, and what step and stream have."""
    steps = threads * (BLOCKS + IN_EIGHT_BITS + rows(batch, 1)) + rows(
        batch, 4
    )  # and of the stream
    return WORKER + n_saes * 16_009_000 * 24 + gradients * GRADIENT + steps


def planned(n_saes, cluster, resources=None, **changes):
    configs = [config(expansion_factor=8, **changes)] * n_saes
    fitted = fit(resources or Resources(), cluster, n_saes, use_gpu=False)
    return memory_of(configs, fitted, {HOOK: 1000}, 2 * GB, 3 * GB), fitted


def nodes(head_gb, *others_gb):
    """A head of 2 CPUs, and other nodes of 8, with memory as Ray counts it."""
    head = Node("head", {"CPU": 2, "memory": head_gb * GB, HEAD: 1.0}, id="head")
    others = [
        Node(f"n{i}", {"CPU": 8, "memory": gb * GB}, id=f"n{i}") for i, gb in enumerate(others_gb)
    ]
    return Cluster((head, *others))


def test_what_an_sae_takes():
    # 2 x 1000 x 8000 + 1000 + 8000 parameters; weights, two moments and a copy of the three, of 4
    # bytes each. On a GPU only the copy is in main memory. Gradients are a thread's.
    assert sae_bytes(config(expansion_factor=8), {HOOK: 1000}) == 16_009_000 * 6 * 4
    assert sae_bytes(config(expansion_factor=8), {HOOK: 1000}, on_gpu=True) == 16_009_000 * 3 * 4
    assert (
        sae_bytes(config(expansion_factor=8, dtype="float64"), {HOOK: 1000}) == 16_009_000 * 6 * 8
    )


def test_what_a_sweep_takes_is_said():
    memory, fitted = planned(12, nodes(100))
    assert (memory.packs, memory.harvesters, fitted.packs) == (1, 1, 1)
    assert memory.pack == rank(12) + AS_BYTES
    # 12 x 64 MB of weights are more than a harvester has of SAEs at a time.
    assert memory.language_model == HARVESTER + 2 * GB + SAES_AT_HARVESTER
    said = str(memory)
    # 0.65 + 12 x 0.384 + 0.192 + 4 x 0.064 + 0.127 + 0.38 of Ray Train's processes; 12 x 0.125
    assert said == (
        "memory: 3 GB of the object store, 1 x 2.92 GB for harvesters, 1 x 6.22 GB for "
        "packs, 1.5 GB for trials, 1.1 GB for the rest"
    )


def test_what_fits_each_node_is_taken_and_what_does_not_is_refused_with_the_numbers():
    # The head: 2.92 + (0.65 + 12 x 0.384 + 0.192 + 0.256 + 0.127) + 0.38 + 1.5 + 1.1 = 11.74 GB.
    for head_gb, fits in ((11.8, True), (11.7, False)):
        memory, fitted = planned(12, nodes(head_gb))
        if fits:
            check_memory(memory, fitted, nodes(head_gb), ["head"])
            continue
        with pytest.raises(ConfigError, match=r"11\.7 GB are needed on head \(5\.84 GB for packs"):
            check_memory(memory, fitted, nodes(head_gb), ["head"])
    # Three nodes of 8 cores, a pack of 4 SAEs on each, which have their lanes spread, one SAE after
    # the other: 0.65 + 1.54 + 5 x 0.064 + 0.12 + 0.19 GB.
    for gb, fits in ((2.9, True), (2.8, False)):
        cluster = nodes(10, gb, gb, gb)
        memory, fitted = planned(12, cluster)
        of_pack = rank(4, threads=1, gradients=5) + 3 * BLOCKS + AS_BYTES
        assert (memory.packs, memory.pack) == (3, of_pack)
        if fits:
            check_memory(memory, fitted, cluster, ["head"])
            continue
        with pytest.raises(ConfigError, match=r"2\.81 GB are needed on n0"):
            check_memory(memory, fitted, cluster, ["head"])


def test_trials_and_ray_trains_processes_count_on_the_head():
    # 100 x 0.125 + 0.38 + 1.1: whatever the other nodes have. A scheduler decides on all of them.
    cluster = nodes(13, 500)
    memory, fitted = planned(100, cluster, scheduler=ASHA)
    with pytest.raises(ConfigError, match=r"14 GB are needed on head \(12\.5 GB for trials"):
        check_memory(memory, fitted, cluster, ["n0"])
    assert memory.trials + PACK + SWEEP == pytest.approx(13.98 * GB)
    # Where Ray does not say how much memory a node has, nothing is refused.
    check_memory(memory, fitted, Cluster((Node("n", {"CPU": 8, HEAD: 1.0}, id="n"),)), ["n"])


def of_batch_sizes(n, **changes):
    return [config(expansion_factor=8, train_batch_size=512 * (i + 1), **changes) for i in range(n)]


def test_packs_go_in_waves_where_memory_has_no_room_for_all_of_them():
    # Beside 1.1 of the rest, 0.65 that harvest and 8 x 0.12 of trials 1.03 for each pack.
    saes = of_batch_sizes(8)
    for head_gb, packs, passes in ((24, 8, 1), (6.5, 3, 3), (3, 1, 8)):
        fitted = fit_saes(saes, nodes(head_gb), use_gpu=False)
        assert (fitted.packs, fitted.passes) == (packs, passes)
        assert fitted.most_packs == (0 if passes == 1 else packs)
    # With their SAEs, where their width is known: 0.38, 0.19 and more. (7 - 2.75) / 1.9 = 2.2
    fitted = fit_saes(of_batch_sizes(8, d_in=1000), nodes(7), use_gpu=False)
    assert (fitted.packs, fitted.passes) == (2, 4)
    memory = memory_of(of_batch_sizes(8, d_in=1000), fitted, {HOOK: 1000}, 0, 0)
    check_memory(memory, fitted, nodes(7), ["head"])


def test_packs_of_different_sizes_are_counted_as_they_are():
    saes = [*of_batch_sizes(1), *[config(expansion_factor=8)] * 3]
    fitted = fit_saes(saes, nodes(100), use_gpu=False)
    memory = memory_of(saes, fitted, {HOOK: 1000}, 0, 0)
    # One thread each, of the two cores.
    larger, smaller = rank(3, 1, gradients=2), rank(1, 1, gradients=2, batch=512)
    assert memory.each_pack == (larger + AS_BYTES, smaller + AS_BYTES)
    # 2 x (0.65 + 0.19 + 0.38) + 4 x 0.384 + 4 x 0.064 + 0.121
    assert "4.36 GB for 2 packs" in str(memory)


def test_a_gradient_for_each_lane_where_an_saes_lanes_are_spread():
    one = [config(expansion_factor=8)]
    fitted = fit_saes(one, nodes(500), use_gpu=False)
    memory = memory_of(one, fitted, {HOOK: 1000}, 0, 0)
    assert fitted.threads == 2
    assert memory.trainer.gradients == 5 * GRADIENT  # of 4,096 rows in lanes of 1,024, and the sum


def test_a_ray_of_ones_own_has_smaller_processes():
    saes = [config(expansion_factor=8)] * 6
    fitted = fit_saes(saes, nodes(500), use_gpu=False)
    mine, others = (memory_of(saes, fitted, {HOOK: 1000}, 0, 0, own) for own in (True, False))
    assert others.total - mine.total == SWEEP - OWN_SWEEP
    assert mine.total == mine.pack + mine.language_model + PACK + 6 * TRIAL + OWN_SWEEP


def test_a_harvester_has_the_saes_it_evaluates():
    one = 16_009_000 * 4
    for n, together in ((1, one), (2, 2 * one), (100, SAES_AT_HARVESTER)):
        saes = [config(expansion_factor=8)] * n
        fitted = fit_saes(saes, nodes(500), use_gpu=False)
        assert memory_of(saes, fitted, {HOOK: 1000}, 0, 0).language_model == HARVESTER + together
    wide = [config(expansion_factor=80)]  # more than that by itself
    memory = memory_of(wide, fit_saes(wide, nodes(500), use_gpu=False), {HOOK: 1000}, 0, 0)
    assert memory.language_model == HARVESTER + (2 * 1000 * 80_000 + 1000 + 80_000) * 4
