"""Several hook points and batch sizes in one sweep on real Ray: one pass, and the same bits."""

import pytest
from ray.cluster_utils import Cluster
from support.bundled import HOOK
from support.running import weights_of

import saeray
from saeray.client.connect import all_ended

WIDE = "blocks.1.mlp.hook_post"  # 512 wide, where HOOK is 128


def test_one_pass_serves_all_hook_points_and_batch_sizes(ray_instance, alone, tiny, tmp_path):
    grid = tiny | dict(hook_point=[HOOK, WIDE], train_batch_size=[1024, 512])
    four = saeray.sweep(grid, name="four", storage_path=tmp_path, live=False)
    assert [row["status"] for row in four.rows] == ["done"] * 4
    assert [len(pack) for pack in four.status.packs] == [2, 2]  # one for each batch size
    assert "passes" not in four.status.placement
    assert four.status.harvested_tokens == 16 * 1024
    assert "one SAE trained on 16,384 (1.000x)" in four.summary()

    assert weights_of(four, hook_point=HOOK, train_batch_size=1024) == weights_of(alone)
    wide = dict(hook_point=WIDE, train_batch_size=512)
    by_itself = saeray.sweep(tiny | wide, name="wide", storage_path=tmp_path, live=False)
    assert weights_of(four, **wide) == weights_of(by_itself)


@pytest.fixture
def little_memory():
    """A node with room for three packs, as long as nobody knows how wide their SAEs are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        # 1.1 GB of the rest, 0.65 that harvest, 3 x 0.12 of trials; 1.85 for each pack: 7.66. The
        # three SAEs, 4.2 million parameters each, take 0.17 more: 8.17.
        args = dict(num_cpus=2, memory=8 * 10**9, object_store_memory=300_000_000)
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
