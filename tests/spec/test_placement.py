"""Where harvesters and trainers go: node by node, with the numbers where nothing fits."""

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


def test_auto_makes_use_of_every_node_with_as_few_packs_as_that_takes():
    # The head gives nothing; the harvester leaves 1.5 + 2: three packs of one CPU use 3 of 3.5, a
    # pack of two only 2.
    two = fit(Resources(), cluster(0, 2, 2), 6, use_gpu=False)
    assert (two.trainer_cpus, two.saes_per_trainer, two.threads) == (1.0, 2, 1)
    # 3.5 and 8 are left: three packs of 3 CPUs would use 9, one pack of 8 nearly as much.
    uneven = fit(Resources(), cluster(4, 8), 12, use_gpu=False)
    assert (uneven.trainer_cpus, uneven.saes_per_trainer) == (8.0, 12)
    # 16 nodes with 8 CPUs: 15 whole ones, so 12 SAEs are 12 packs.
    many = fit(Resources(), cluster(*[8] * 16), 12, use_gpu=False)
    assert (many.trainer_cpus, many.saes_per_trainer) == (8.0, 1)


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
    fitted = fit(Resources(), MACHINE, n_saes=6, use_gpu=False)
    assert (fitted.harvesters, fitted.saes_per_trainer, fitted.threads) == (1, 6, 2)
    assert fitted.harvesters * fitted.harvester_cpus + fitted.trainer_cpus <= 2
    gpus = fit(Resources(harvesters=2), Cluster.one_machine(16, 8), n_saes=12, use_gpu=True)
    assert (gpus.trainer_gpus, gpus.saes_per_trainer) == (1.0, 2)
    alone = fit(Resources(), Cluster.one_machine(16, 1), n_saes=12, use_gpu=True)
    assert alone.harvester_gpus + alone.trainer_gpus <= 1
    assert alone.saes_per_trainer == 12


def test_resources_that_contradict_the_cluster_are_refused():
    with pytest.raises(ConfigError, match=r"harvesters of 0.5 CPUs .* the cluster has 2"):
        fit(Resources(harvesters=4, trainer_cpus=1), MACHINE, 6, use_gpu=False)
    with pytest.raises(ConfigError, match="no GPU"):
        fit(Resources(), MACHINE, 6, use_gpu=True)
