"""Packs for which memory has no room at once. In a Ray of its own: this file must find none."""

import pytest
from ray.cluster_utils import Cluster

import saeray
from saeray.client.connect import all_ended


@pytest.fixture
def little_memory():
    """A node with room for three packs, as long as nobody knows how wide their SAEs are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        # 1.1 GB of the rest, 0.65 that harvest, 3 x 0.125 of trials; 1.04 for each pack: 5.2. The
        # three SAEs, 4.2 million parameters each, take 0.2 more with their gradients: 5.8.
        args = dict(num_cpus=2, memory=55 * 10**8, object_store_memory=300_000_000)
        made = Cluster(initialize_head=True, head_node_args=args | dict(include_dashboard=False))
        yield made.address
        with all_ended(made.list_all_nodes()):
            made.shutdown()


@pytest.mark.slow
def test_packs_for_which_there_is_no_memory_come_later(little_memory, tiny, tmp_path):
    grid = tiny | dict(train_batch_size=[256, 512, 1024], expansion_factor=128)
    three = saeray.sweep(
        grid, name="three", storage_path=tmp_path, live=False, address=little_memory
    )
    assert [row["status"] for row in three.rows] == ["done"] * 3
    said = three.status.placement
    assert (
        "2 passes over the text (3 packs, 2 at a time, as memory allows); one by more mem" in said
    )
    assert three.status.harvested_tokens == 2 * 16 * 1024
