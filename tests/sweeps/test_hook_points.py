"""Several hook points and batch sizes in one sweep on real Ray: one pass, and the same bits."""

from support.bundled import HOOK
from support.running import weights_of

import saeray

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
