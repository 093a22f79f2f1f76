"""Configs, grids and plans: every bad input is refused with field, value and remedy."""

import pytest
from support.bundled import ROOT

from saeray.errors import ConfigError
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve, stream_key
from saeray.spec.grid import SAE, derived_name, expand
from saeray.spec.placement import Store, fit
from saeray.spec.plan import check_fits, cut_packs, plan_stream
from saeray.spec.resources import Resources
from saeray.spec.room import Cluster

HOOK = "blocks.2.hook_resid_pre"


def config(**changes):
    values = dict(model_name="m", hook_point=HOOK, dataset_path="d")
    return LanguageModelSAERunnerConfig(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "field", "remedy"),
    [
        (dict(lr="fast"), "lr", "a number"),
        (dict(lr=-1e-3), "lr", "above 0"),
        (dict(lr=float("nan")), "lr", "finite"),
        (dict(train_batch_size=4096.5), "train_batch_size", "a whole number"),
        (dict(use_ghost_grads="yes"), "use_ghost_grads", "true or false"),
        (dict(training_tokens=100), "training_tokens", "train_batch_size = 4096"),
        (dict(hook_point_layer=3), "hook_point_layer", "layer 2"),
        (dict(hook_point="blocks.{layer}.hook_mlp_out"), "hook_point_layer", "needs a layer"),
        (dict(lr_scheduler_name="cosine"), "lr_scheduler_name", "cosineannealing"),
        (dict(b_dec_init_method="median"), "b_dec_init_method", "geometric_median"),
        (dict(mse_normalization="sum"), "mse_normalization", "centred_norm"),
        (dict(dtype="float31"), "dtype", "float32"),
        (dict(activation_dtype="int8"), "activation_dtype", "bfloat16"),
        (dict(device="gpu"), "device", "cuda"),
        (dict(feature_sampling_method="anthropic"), "feature_sampling_method", "None"),
        (dict(n_batches_in_buffer=1), "n_batches_in_buffer", "at least 2"),
        (dict(expansion_factor=0), "expansion_factor", "above 0"),
        (dict(eval_windows=0), "eval_windows", "at least 1"),
        (dict(lr=[]), "lr", "empty"),
        (dict(device=["cpu", "cuda"]), "device", "can't be a grid axis"),
        (dict(resources={"harvester": 2}), "resources", "harvesters"),
        (dict(resources={"harvesters": 0}), "resources.harvesters", "at least 1"),
        (dict(resources={"harvester_cpus": 1.5}), "resources.harvester_cpus", "whole number"),
        (dict(resources={"saes_per_trainer": "all"}), "resources.saes_per_trainer", "auto"),
        (dict(stream_tokens=4096), "stream_tokens", "training_tokens"),
    ],
)
def test_a_bad_value_names_field_and_remedy(changes, field, remedy):
    with pytest.raises(ConfigError) as refused:
        config(**changes)
    assert field in str(refused.value)
    assert remedy in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_key_is_refused_with_the_nearest():
    data = dict(model_name="m", hook_point=HOOK, dataset_path="d", l1_coeficient=1e-3)
    with pytest.raises(ConfigError, match=r"sweep\.yaml: unknown key 'l1_coeficient'.*l1_coeff"):
        LanguageModelSAERunnerConfig.from_dict(data, source="sweep.yaml")


def test_missing_fields_are_named():
    with pytest.raises(ConfigError, match="hook_point, dataset_path must be given"):
        LanguageModelSAERunnerConfig.from_dict({"model_name": "m"})


def test_a_bad_value_inside_a_grid_is_found_when_it_is_expanded():
    with pytest.raises(ConfigError, match="lr = 0"):
        expand(config(lr=[1e-3, 0.0]))


def test_the_same_value_twice_is_a_duplicate_trial():
    with pytest.raises(ConfigError, match=r"duplicate trial lr=0\.001"):
        expand(config(lr=[1e-3, 1e-3]))


def test_numbers_that_yaml_reads_as_text_or_float_are_taken():
    c = config(lr="4e-4", training_tokens=3e8, expansion_factor=64)
    assert (c.lr, c.training_tokens, c.expansion_factor) == (4e-4, 300_000_000, 64)
    assert isinstance(c.training_tokens, int)


def test_units_of_the_guide():
    # 300M tokens in batches of 4,096: 73,242 steps; 32 contexts of 128: 4,096 rows a block.
    c = config(training_tokens=300_000_000)
    assert c.steps == 73_242
    assert c.block_rows == 4_096
    assert c.d_sae(768) == 3_072
    assert config(wandb_log_frequency=100).resolved_eval_every == 1_000
    assert config(eval_every=0).resolved_eval_every == 0


def test_hook_layers():
    assert config().hook_point_layer == 2
    c = config(hook_point="blocks.{layer}.hook_mlp_out", hook_point_layer=5)
    assert c.resolved_hook_point == "blocks.5.hook_mlp_out"
    layers = expand(config(hook_point="blocks.{layer}.hook_mlp_out", hook_point_layer=[1, 3]))
    assert [s.config.resolved_hook_point for s in layers] == [
        "blocks.1.hook_mlp_out",
        "blocks.3.hook_mlp_out",
    ]


def test_a_torch_dtype_and_the_guides_old_name_are_taken():
    import torch

    c = LanguageModelSAERunnerConfig.from_dict(
        dict(
            model_name="m",
            hook_point=HOOK,
            dataset_path="d",
            dtype=torch.float32,
            total_training_tokens=1_000_000,
        )
    )
    assert c.dtype == "float32"
    assert c.training_tokens == 1_000_000


def test_plain_data_and_back():
    c = config(lr=[1e-3, 2e-3], resources=Resources(harvesters=2))
    assert LanguageModelSAERunnerConfig.from_dict(c.to_dict()) == c


def test_a_grid_is_the_product_of_its_lists_and_shares_one_stream():
    saes = expand(config(lr=[1e-3, 2e-3], l1_coefficient=[1e-4, 2e-4, 3e-4], seed=[1, 2]))
    assert len(saes) == len({s.name for s in saes}) == 12
    assert saes[0].name == "seed=1,lr=0.001,l1_coefficient=0.0001"
    # The stream is seeded by the first seed and as long as the longest training.
    assert {s.config.data_seed for s in saes} == {1}
    assert len({stream_key(s.config) for s in saes}) == 1
    lengths = expand(config(training_tokens=[8192, 16384]))
    assert {s.config.stream_tokens for s in lengths} == {16384}


def test_what_changes_the_stream_changes_its_key():
    base = resolve(config())
    for changes in (dict(context_size=64), dict(data_seed=1), dict(activation_dtype="bfloat16")):
        assert stream_key(base.replace(**changes)) != stream_key(base)
    for changes in (dict(lr=1.0), dict(seed=5), dict(hook_point="blocks.1.hook_resid_pre")):
        changed = base.replace(hook_point_layer=None, **changes)
        assert stream_key(changed) == stream_key(base)


def test_names_are_derived_and_safe():
    c = resolve(config(lr=0.0004))
    assert derived_name(c) == derived_name(resolve(config(lr=0.0004)))
    assert derived_name(c) != derived_name(c.replace(seed=1))
    assert derived_name(c, ["hook_point"]) == f"hook_point={HOOK}"
    assert "/" not in derived_name(c.replace(model_name="a/b"), ["model_name"])
    close = [derived_name(c.replace(lr=x), ["lr"]) for x in (0.00041234567, 0.00041234568)]
    assert len(set(close)) == 2


# --- plan ------------------------------------------------------------------------------------

MACHINE = Cluster.one_machine(cpus=2)


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


def test_packs_are_even_and_share_hook_and_batch_size():
    saes = expand(
        config(
            lr=[1e-3, 2e-3, 3e-3, 4e-3, 5e-3],
            hook_point="blocks.{layer}.hook_mlp_out",
            hook_point_layer=[1, 2],
        )
    )
    packs = cut_packs(saes, per_pack=3)
    assert sorted(map(len, packs)) == [2, 2, 3, 3]
    assert sorted(s.name for p in packs for s in p) == sorted(s.name for s in saes)
    for pack in packs:
        assert len({s.config.resolved_hook_point for s in pack}) == 1


def test_every_shipped_sweep_file_is_a_valid_config():

    from saeray.client.cli import load_sweep_file

    files = sorted((ROOT / "sweeps").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        saes = expand(LanguageModelSAERunnerConfig.from_dict(load_sweep_file(file), str(file)))
        assert all(isinstance(s, SAE) for s in saes)
        assert file.read_text().startswith("# ")  # says what it is for and what it costs
