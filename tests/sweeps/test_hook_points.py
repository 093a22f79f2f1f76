"""Several hook points and batch sizes in one sweep on real Ray: one pass, and the same bits."""

import pytest
from support.bundled import HOOK, tiny_fields
from support.running import weights_of

import saeray

WIDE = "blocks.1.mlp.hook_post"  # 512 wide, where HOOK is 128


@pytest.fixture(scope="module")
def four(ray_instance, tmp_path_factory):
    grid = tiny_fields() | dict(hook_point=[HOOK, WIDE], train_batch_size=[1024, 512])
    return saeray.sweep(grid, name="four", storage_path=tmp_path_factory.mktemp("four"), live=False)


@pytest.mark.slow  # in CI test_architectures_together.py has a pack at several hook points
def test_one_pass_serves_all_hook_points_and_batch_sizes(four, alone):
    assert [row["status"] for row in four.rows] == ["done"] * 4
    assert [len(pack) for pack in four.status.packs] == [2, 2]  # one for each batch size
    assert "passes" not in four.status.placement
    assert four.status.harvested_tokens == 16 * 1024
    assert "one SAE trained on 16,384 (1.000x)" in four.summary()

    assert weights_of(four, hook_point=HOOK, train_batch_size=1024) == weights_of(alone)


@pytest.mark.slow
def test_at_the_wide_place_it_is_as_one_that_is_there_alone(four, tiny, tmp_path):
    wide = dict(hook_point=WIDE, train_batch_size=512)
    by_itself = saeray.sweep(tiny | wide, name="wide", storage_path=tmp_path, live=False)
    assert weights_of(four, **wide) == weights_of(by_itself)
