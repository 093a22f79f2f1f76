"""Where harvesters and trainers go: node by node, with the numbers where nothing fits."""

import itertools

import pytest

from saeray.errors import ConfigError
from saeray.spec.placement import Store, fit, store_of
from saeray.spec.resources import Resources
from saeray.spec.room import Cluster, Node, Room

GIB = 2**30


def cluster(*cpus, gpus=0, planned=()):
    nodes = [Node(f"n{i}", {"CPU": c, "GPU": gpus}, GIB, id=f"id{i}") for i, c in enumerate(cpus)]
    return Cluster(tuple(nodes), tuple(planned))


def packs_at_once(fitted, cluster):
    room = Room(cluster.nodes)
    assert room.place_all(fitted.harvester, fitted.harvesters) is not None
    return room.how_many(fitted.trainer, 100)


def test_a_trainer_must_fit_on_one_node_and_not_into_the_sum_of_all():
    # 3 x 2 CPUs are 6, but no node has 4.
    with pytest.raises(ConfigError, match=r"1 trainer of 4 CPUs do not fit .* 6 CPUs \(n0: 2 CPUs"):
        fit(Resources(trainer_cpus=4), cluster(2, 2, 2), 6, use_gpu=False)


def test_auto_is_a_pack_a_node_on_all_its_cores():
    # The head gives nothing; the harvester leaves 1.5 + 2. Packs of one CPU each could both be
    # put onto the free node, packs of 1.5 can't.
    two = fit(Resources(), cluster(0, 2, 2), 6, use_gpu=False)
    assert (two.trainer_cpus, two.saes_per_trainer, two.threads) == (1.5, 3, 2)
    # 3.5 and 8 are left: a node with room for one pack of 3.5 has room for two, so 8 take part.
    uneven = fit(Resources(), cluster(4, 8), 12, use_gpu=False)
    assert (uneven.trainer_cpus, uneven.saes_per_trainer) == (8.0, 12)
    # 16 nodes with 8 CPUs, 7.5 of one: packs of 7 are one a node, so 12 SAEs are 12 packs and 24
    # SAEs are 12 packs of two; with 15 or with 16 of them, one would have to train two anyway.
    many = cluster(*[8] * 16)
    for n_saes, cpus, per_pack in ((12, 8.0, 1), (24, 8.0, 2), (32, 7.0, 2)):
        fitted = fit(Resources(), many, n_saes, use_gpu=False)
        assert (fitted.trainer_cpus, fitted.saes_per_trainer, fitted.threads) == (cpus, per_pack, 8)
    # Five SAEs on four nodes: three nodes take as long as four.
    assert fit(Resources(), cluster(*[8] * 4), 5, use_gpu=False).saes_per_trainer == 2
    assert fit(Resources(), cluster(*[8] * 4), 5, use_gpu=False).trainer_cpus == 8.0


HELD = (0.0, 0.25, 0.5, 1.37)  # of a node, by other work


@pytest.mark.parametrize("n_nodes", range(1, 9))
def test_never_more_packs_than_nodes_whatever_the_grid_and_the_cores(n_nodes):
    """1 to 200 SAEs, 1 to 128 cores, other work on some nodes; and nodes of two sizes."""
    for cpus in (1, 2, 3, 4, 6, 8, 16, 31, 64, 128):
        for held, smaller in itertools.product(HELD, (1, 2)):
            sizes = [max(0.5, cpus - held), *[max(1, cpus // smaller)] * (n_nodes - 1)]
            nodes = cluster(*sizes)
            if sum(sizes) < 0.6:
                continue
            for n_saes in (1, 2, 3, 7, 14, 15, 16, 40, 64, 113, 200):
                fitted = fit(Resources(), nodes, n_saes, use_gpu=False)
                packs = -(-n_saes // fitted.saes_per_trainer)
                room = Room(nodes.nodes)
                assert room.place_all(fitted.harvester, 1) is not None  # its share is kept
                free = [f["CPU"] for f in room.free]
                used = [f for f in free if f + 1e-6 >= fitted.trainer_cpus]
                assert 1 <= packs <= len(used), (sizes, n_saes, fitted)
                # Wherever Ray puts them, no two of them are on one node.
                assert max(free) < 2 * fitted.trainer_cpus, (sizes, n_saes, fitted)
                # All that is free of the smallest, but for what is left of a core.
                assert min(used) - fitted.trainer_cpus < 1, (sizes, n_saes, fitted)
                assert fitted.threads >= int(min(used)), (sizes, n_saes, fitted)
                # No slower than one pack on the largest node.
                slowest = -(-n_saes // packs) / min(used)
                assert slowest <= n_saes / max(free) + 1e-9, (sizes, n_saes, fitted)


def test_given_packs_get_as_many_cpus_as_let_all_of_them_run():
    # 0.5 for the harvester leaves 1.5 + 2: one CPU for each of three packs, for six 0.5.
    three = fit(Resources(saes_per_trainer=2), cluster(2, 2), 6, use_gpu=False)
    assert (three.trainer_cpus, packs_at_once(three, cluster(2, 2))) == (1.0, 3)
    six = fit(Resources(saes_per_trainer=1), cluster(2, 2), 6, use_gpu=False)
    assert (six.trainer_cpus, packs_at_once(six, cluster(2, 2))) == (0.5, 7)


def test_harvesters_go_where_they_leave_room_for_the_trainers():
    fitted = fit(Resources(trainer_cpus=8), cluster(8, 2), 4, use_gpu=False)
    assert fitted.harvester_nodes == ("id1",)


def test_gpus_custom_resources_and_labels_say_which_node():
    nodes = (
        Node("head", {"CPU": 4}),
        Node("h", {"CPU": 8, "GPU": 1, "harvester": 1}, GIB, {"zone": "a"}, id="h"),
        Node("t", {"CPU": 8, "GPU": 2, "trainer": 2}, GIB, {"zone": "b"}, id="t"),
    )
    by_resource = Resources(harvester_resources={"harvester": 1}, trainer_resources={"trainer": 1})
    fitted = fit(by_resource, Cluster(nodes), 6, use_gpu=True)
    assert (fitted.harvester_nodes, fitted.saes_per_trainer) == (("h",), 3)
    assert fitted.trainer.resources == {"CPU": 1.0, "GPU": 1.0, "trainer": 1.0}
    by_label = Resources(harvester_labels={"zone": "b"}, trainer_labels={"zone": "a"})
    fitted = fit(by_label, Cluster(nodes), 6, use_gpu=True)
    assert (fitted.harvester_nodes, fitted.saes_per_trainer) == (("t",), 6)
    with pytest.raises(ConfigError, match=r"label zone=c"):
        fit(Resources(trainer_labels={"zone": "c"}), Cluster(nodes), 6, use_gpu=True)


def test_ranks_of_a_pack_may_be_on_different_nodes():
    fitted = fit(Resources(num_workers=2, trainer_cpus=1), cluster(2, 1), 4, use_gpu=False)
    assert fitted.num_workers == 2
    with pytest.raises(ConfigError, match="2 trainers of 1 CPUs"):
        fit(Resources(num_workers=2, trainer_cpus=1), cluster(1, 1), 4, use_gpu=False)


def test_planned_nodes_are_asked_for_only_where_nothing_fits_and_as_few_as_will_do():
    kinds = [Node("gpu", {"CPU": 8, "GPU": 1}, planned=True) for _ in range(4)]
    none_needed = fit(Resources(), cluster(16, gpus=2, planned=kinds), 8, use_gpu=True)
    assert none_needed.waits_for == ""
    from_nothing = fit(Resources(harvester_gpus=1), cluster(4, planned=kinds), 8, use_gpu=True)
    assert from_nothing.waits_for
    assert from_nothing.saes_per_trainer == 8
    more = fit(
        Resources(harvester_gpus=1, saes_per_trainer=4, trainer_gpus=1),
        cluster(4, planned=kinds), 8, use_gpu=True,
    )  # fmt: skip
    assert more.waits_for == "3 x gpu"  # a harvester and two packs
    with pytest.raises(ConfigError, match=r"the autoscaler can add 4 x \(8 CPUs, 1 GPUs\)"):
        fit(Resources(trainer_gpus=2), cluster(4, planned=kinds), 8, use_gpu=True)


def test_a_stream_that_runs_already_needs_no_room_for_harvesters():
    full = Resources(harvester_cpus=1, trainer_cpus=1)
    with pytest.raises(ConfigError):
        fit(full, cluster(1), 2, use_gpu=False)
    assert fit(full, cluster(1), 2, use_gpu=False, harvest=False).harvesters == 0


def test_the_store_is_that_of_the_harvesters_nodes():
    # Two harvesters on n0 make two thirds of the blocks: n0 must hold those, so 1.5 GiB in all.
    assert store_of(cluster(2, 2), ["id0", "id0", "id1"]) == Store(int(1.5 * GIB))
    assert store_of(cluster(2, 2), ["id1"]) == Store(GIB)


def test_what_other_streams_may_take_of_the_store_is_not_there():
    # n0 has 0.75 GiB to use and nothing else on it; n1 has 0.75 - 0.5 = 0.25.
    both = store_of(cluster(2, 2), ["id0", "id1"], {"id1": GIB // 2})
    assert both == Store(2 * GIB, GIB)
    assert both.usable == GIB // 2  # twice what n1 can hold: the other half lies on n0
    assert Store(GIB, GIB).usable == 0


MACHINE = Cluster.one_machine(cpus=2)


def test_auto_fits_the_machine():
    fitted = fit(Resources(), MACHINE, saes=6, use_gpu=False)
    assert (fitted.harvesters, fitted.saes_per_trainer, fitted.threads) == (1, 6, 2)
    assert fitted.harvesters * fitted.harvester_cpus + fitted.trainer_cpus <= 2
    gpus = fit(Resources(harvesters=2), Cluster.one_machine(16, 8), saes=12, use_gpu=True)
    assert (gpus.trainer_gpus, gpus.saes_per_trainer) == (1.0, 2)
    alone = fit(Resources(), Cluster.one_machine(16, 1), saes=12, use_gpu=True)
    assert alone.harvester_gpus + alone.trainer_gpus <= 1
    assert alone.saes_per_trainer == 12


def test_resources_that_contradict_the_cluster_are_refused():
    with pytest.raises(ConfigError, match=r"harvesters of 0.5 CPUs .* the cluster has 2"):
        fit(Resources(harvesters=4, trainer_cpus=1), MACHINE, 6, use_gpu=False)
    with pytest.raises(ConfigError, match="no GPU"):
        fit(Resources(), MACHINE, 6, use_gpu=True)


# --- SAEs of several batch sizes: only those of one may share a pack -----------------------------


def shape(fitted):
    return fitted.packs, fitted.saes_per_trainer, fitted.trainer_cpus, fitted.passes


def test_kinds_that_share_no_pack_run_at_once_on_smaller_shares_of_the_cores():
    # Beside the harvester 1.5 CPUs are left: half for each of two, a twelfth for each of 12.
    assert shape(fit(Resources(), MACHINE, [4, 8], use_gpu=False)) == (2, 8, 0.75, 1)
    assert shape(fit(Resources(), MACHINE, [1] * 12, use_gpu=False)) == (12, 1, 0.12, 1)
    assert shape(fit(Resources(), MACHINE, [1] * 40, use_gpu=False)) == (40, 1, 0.03, 1)
    # A grid of one kind, 40 SAEs or 3 hook points times 4, is one pack, as ever.
    assert shape(fit(Resources(), MACHINE, [40], use_gpu=False)) == (1, 40, 1.0, 1)
    assert not fit(Resources(), MACHINE, 12, use_gpu=False).share_cores
    assert fit(Resources(), MACHINE, [4, 8], use_gpu=False).share_cores


def test_kinds_have_nodes_of_their_own_where_there_are_enough():
    two = fit(Resources(), cluster(2, 2), [4, 4], use_gpu=False)
    assert (shape(two), two.share_cores) == ((2, 4, 1.5, 1), False)
    three = fit(Resources(), cluster(2, 2), [4, 4, 4], use_gpu=False)
    assert (shape(three), three.share_cores) == ((3, 4, 1.0, 1), True)
    # Four packs of two: three of the one kind, one of the other.
    assert shape(fit(Resources(), cluster(8, 8, 8, 8), [6, 2], use_gpu=False)) == (4, 2, 7.0, 1)


def test_kinds_share_a_gpu_and_the_cpus_beside_it():
    one_gpu = fit(Resources(), Cluster.one_machine(16, 1), [6, 6], use_gpu=True)
    assert (shape(one_gpu), one_gpu.trainer_gpus) == ((2, 6, 1.0, 1), 0.37)
    few_cpus = fit(Resources(), Cluster.one_machine(2, 1), [6, 6], use_gpu=True)
    assert (shape(few_cpus), few_cpus.trainer_gpus) == ((2, 6, 0.5, 1), 0.37)
    assert one_gpu.share_cores
    # One of three GPUs harvests.
    two_left = fit(Resources(), Cluster.one_machine(16, 3), [6, 6], use_gpu=True)
    assert (shape(two_left), two_left.trainer_gpus) == ((2, 6, 1.0, 1), 1.0)


def test_where_packs_go_in_waves_it_is_said_with_what_would_make_it_one_pass():
    one_pass = fit(Resources(), MACHINE, [4, 8], use_gpu=False)
    assert one_pass.passes_said(cached=False) == ""
    waves = fit(Resources(trainer_cpus=1), MACHINE, [4, 8], use_gpu=False)
    assert shape(waves) == (1, 8, 1.0, 2)
    assert waves.passes_said(cached=False) == (
        "2 passes over the text (2 packs, 1 at a time); one by resources.trainer_cpus: auto; "
        "activation_cache: DIR keeps what the first one harvests for the others"
    )
    assert waves.passes_said(cached=True).endswith("; all but the first from activation_cache")
    # On one GPU packs as given are taken to be what fits into its memory.
    given = fit(Resources(saes_per_trainer=4), Cluster.one_machine(16, 1), [6, 6], use_gpu=True)
    assert (given.packs, given.all_packs, given.passes) == (1, 4, 4)
    assert given.one_pass_by == "resources.saes_per_trainer: auto"
    both = fit(Resources(trainer_cpus=1, harvester_cpus=1, saes_per_trainer=1), MACHINE, 4, False)
    assert (both.passes, both.one_pass_by) == (4, "resources.trainer_cpus: auto")


def test_no_more_packs_at_once_than_memory_allows():
    three = fit(Resources(), MACHINE, [1] * 8, use_gpu=False, most_packs=3)
    assert shape(three) == (3, 1, 0.5, 3)
    assert three.passes_said(cached=False).startswith(
        "3 passes over the text (8 packs, 3 at a time, as memory allows); one by more memory"
    )
    # Where they are apart only because they were to be, they need not be.
    cut = fit(Resources(saes_per_trainer=1), MACHINE, 8, use_gpu=False, most_packs=3)
    assert (cut.passes, cut.one_pass_by) == (3, "resources.saes_per_trainer: auto")
