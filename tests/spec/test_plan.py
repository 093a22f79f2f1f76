"""Plans: memory counted with every factor, packs cut evenly."""

import pytest
from support.bundled import HOOK
from support.configs import config

from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve
from saeray.spec.grid import expand
from saeray.spec.placement import STORE_SHARE, Store
from saeray.spec.plan import check_fits, cut_packs, plan_stream


def guide_stream(**changes):
    c = resolve(
        config(n_batches_in_buffer=128, store_batch_size=32, training_tokens=300_000_000, **changes)
    )
    return plan_stream(c, [HOOK], {HOOK: 768})


def test_the_buffers_size_counts_every_factor():
    # 128 batches x 32 contexts x 128 tokens = 524,288 activations mixed; one block is
    # 32 * 128 * 768 * 4 bytes = 12,582,912, and three half buffers are 192 blocks.
    plan = guide_stream()
    assert 2 * plan.order.group_blocks * plan.order.block_rows == 524_288
    assert plan.block_bytes == 12_582_912
    assert plan.buffer_bytes == 192 * 12_582_912
    assert guide_stream(activation_dtype="bfloat16").buffer_bytes == 96 * 12_582_912


def test_a_buffer_that_can_not_fit_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"2,415,919,104 bytes .* 2,000,000,000"):
        check_fits(guide_stream(), Store(2 * 10**9))
    # 0.75 * 4e9 = 3e9 bytes are 238 blocks of 12,582,912; beside 5e8 of others 198.
    assert check_fits(guide_stream(), Store(4 * 10**9)) == 238
    assert check_fits(guide_stream(), Store(4 * 10**9, 5 * 10**8)) == 198
    with pytest.raises(ConfigError, match=r"2,000,000,000 may be used beside 1,000,000,000 of oth"):
        check_fits(guide_stream(), Store(4 * 10**9, 10**9))


def test_buffer_bytes_below_the_least_is_refused():
    with pytest.raises(ConfigError, match=r"buffer_bytes = 1,000,000,000: .* 1,610,612,736 bytes"):
        guide_stream(buffer_bytes=1_000_000_000)
    assert guide_stream(buffer_bytes=1_700_000_000).slots == 135


def grid(**changes):
    """Five lr at two hook points."""
    lr = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]
    hook = "blocks.{layer}.hook_mlp_out"
    return expand(config(lr=lr, hook_point=hook, hook_point_layer=[1, 2], **changes))


def hooks_of(pack):
    return {s.config.resolved_hook_point for s in pack}


def test_packs_are_even_and_hold_saes_of_several_hook_points():
    saes = grid()
    (one,) = cut_packs(saes, per_pack=12)
    assert len(one) == 10
    packs = cut_packs(saes, per_pack=3)
    assert sorted(map(len, packs)) == [2, 2, 3, 3]
    assert sorted(s.name for p in packs for s in p) == sorted(s.name for s in saes)


def test_packs_are_of_as_few_hook_points_as_can_be():
    # Of 10 SAEs, 5 at each: two packs of one hook point, four with one that has both.
    assert [len(hooks_of(p)) for p in cut_packs(grid(), per_pack=5)] == [1, 1]
    assert sorted(len(hooks_of(p)) for p in cut_packs(grid(), per_pack=3)) == [1, 1, 1, 2]


def test_packs_are_of_one_batch_size():
    packs = cut_packs(grid(train_batch_size=[1024, 2048]), per_pack=40)
    assert [len(p) for p in packs] == [10, 10]
    for pack in packs:
        assert len({s.config.train_batch_size for s in pack}) == 1


def test_a_store_below_the_minimum_is_refused_with_the_numbers(tiny):
    c = resolve(LanguageModelSAERunnerConfig(**tiny))
    plan = plan_stream(c, [c.hook_point], {c.hook_point: 128})
    enough = int(plan.buffer_bytes / STORE_SHARE) + 2
    check_fits(plan, Store(enough))
    with pytest.raises(ConfigError, match=f"{plan.buffer_bytes:,} bytes"):
        check_fits(plan, Store(enough - 10))
