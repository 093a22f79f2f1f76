"""Configs: every bad input is refused with field, value and remedy."""

from dataclasses import dataclass

import pytest
from support.bundled import HOOK
from support.configs import config

from saeray.errors import ConfigError
from saeray.spec.checks import cautions
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve, stream_key
from saeray.spec.grid import expand
from saeray.spec.guide import FOREIGN
from saeray.spec.resources import Resources


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
        (dict(mse_normalization="summed"), "mse_normalization", "sum"),
        (dict(encoder_init="tied"), "encoder_init", "decoder_transpose"),
        (dict(decoder_norm="l2"), "decoder_norm", "unit, free"),
        (dict(gradient_clip=-1.0), "gradient_clip", "not below 0"),
        (dict(lr_decay_steps=10**6), "lr_decay_steps", "training has 488 steps"),
        (dict(normalize_activations="layer_norm"), "normalize_activations", "expected_average"),
        (dict(dtype="float31"), "dtype", "float32"),
        (dict(dtype="bfloat16"), "dtype", "compute_dtype: bfloat16"),
        (dict(dtype="float16"), "dtype", "compute_dtype: bfloat16"),
        (dict(compute_dtype="float16"), "compute_dtype", "bfloat16"),
        (dict(compute_dtype="bf16"), "compute_dtype", "bfloat16"),
        (dict(compute_dtype="tf32", dtype="float64"), "compute_dtype", "dtype: float32"),
        (dict(activation_dtype="int8"), "activation_dtype", "bfloat16"),
        (dict(device="gpu"), "device", "cuda"),
        (dict(device="cuda:1"), "device", "write cuda: Ray shows each actor only the GPUs"),
        (dict(device="cuda:1"), "device", "CUDA_VISIBLE_DEVICES"),
        (dict(device="cuda:first"), "device", "cpu, cuda, mps or auto"),
        (dict(device="auto:0"), "device", "write auto"),
        (dict(device="mps", dtype="float64"), "dtype", "float32"),
        (dict(feature_sampling_method="l1"), "feature_sampling_method", "anthropic, l2"),
        (dict(lr="quick"), "lr", "a number is wanted here, or auto"),
        (dict(lr="auto"), "lr", "give architecture: standard a number"),
        (dict(lr="auto", architecture="topk", k=8), "lr", "give d_in, too"),
        (dict(lr="0"), "lr", "above 0"),
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
        (dict(lr_end=4e-5 * 1e5), "lr_end", "a fraction of lr"),
        (dict(name="a/b"), "name", "a folder's name"),
        (dict(name=".."), "name", "a folder's name"),
        (dict(name="a\nb"), "name", "a folder's name"),
        (dict(name="", lr=1e-3), "name", "a folder's name"),
        (dict(name="ä" * 101), "name", "at most 200 bytes"),
        # Of the guide's code and its heirs: what asks for something else than what is done.
        (dict(lp_norm=2), "lp_norm = 2", "L1"),
        (dict(use_cached_activations=True), "use_cached_activations = True", "activation_cache"),
        (dict(hook_point_head_index=3), "hook_point_head_index", "hook_z"),
        (dict(l1_coeficient=1e-3), "unknown key 'l1_coeficient'", "l1_coefficient"),
        (dict(hook_name="blocks.1.hook_resid_pre"), "hook_point is given twice", "another name"),
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


def test_keywords_of_the_guides_code_that_say_what_is_done_anyway_are_taken():
    guide = dict(
        use_cached_activations=False, lp_norm=1.0, from_pretrained_path=None, resample_batches=1028,
        dead_feature_estimation_method="no_fire", feature_reinit_scale=0.2, noise_scale=0.0,
        hook_point_head_index=None, verbose=False, total_training_tokens=8192 * 4,
        store_batch_size_prompts=8, train_batch_size_tokens=2048,
    )  # fmt: skip
    taken = config(**guide)
    assert taken == config(training_tokens=8192 * 4, store_batch_size=8, train_batch_size=2048)
    assert set(FOREIGN).isdisjoint(taken.to_dict())  # what has a field is not foreign any more
    with pytest.raises(ConfigError, match="given by name"):
        LanguageModelSAERunnerConfig("gpt2-small")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"architectur": "topk"}, "did you mean architecture?"),
        ({"arch": "topk"}, "did you mean architecture?"),
        ({"warmup": 100}, "did you mean l1_warm_up_steps or lr_warm_up_steps?"),
        ({"learning_rate": 1e-3}, "write lr."),
        ({"epochs": 3}, "no field is called like that; `saeray fields`"),
        ({"d_sae": 1024}, "write expansion_factor = d_sae / d_in"),
        ({"d_sae": 1024, "d_in": 128}, "write expansion_factor: 8."),
        ({"output_path": "out"}, "write storage_path"),
        ({"eval_every_n_wandb_logs": 10}, "write eval_every: optimizer steps"),
        ({"aux_loss_coefficient": 1.0}, "write auxk_coefficient"),
    ],
)
def test_an_unknown_key_gets_a_near_name_or_a_sentence_and_no_far_fetched_guess(given, said):
    with pytest.raises(ConfigError) as refused:
        config(**given)
    assert said in str(refused.value)
    assert "data_seed" not in str(refused.value) and "share_stream" not in str(refused.value)


def test_what_sae_lens_nests_is_refused_with_the_lines_to_write():
    # `LanguageModelSAERunnerConfig` of sae_lens 6.54.12: what has no nest is taken or mapped.
    flat = dict(
        n_restart_cycles=1, hook_eval="NOT_IN_USE", model_class_name="HookedTransformer",
        activations_mixing_fraction=0.5, llm_device=None, autocast=False, output_path=None,
        save_final_checkpoint=False, model_kwargs={}, sae_lens_version="6.54.12", verbose=True,
    )  # fmt: skip
    assert config(**flat) == config()
    with pytest.raises(ConfigError) as refused:
        config(
            sae=dict(architecture="standard", d_in=128, d_sae=1024, l1_coefficient=5, lp_norm=1,
                     apply_b_dec_to_input=False)
        )  # fmt: skip
    assert str(refused.value) == (
        "sae: fields stand flat here; in its place write recipe: sae_lens; architecture: standard; "
        "d_in: 128; expansion_factor: 8; l1_coefficient: 5. apply_b_dec_to_input: b_dec is "
        "subtracted from the input."
    )

    @dataclass
    class LoggingConfig:
        log_to_wandb: bool = False
        eval_every_n_wandb_logs: int = 100
        wandb_log_frequency: int = 30
        wandb_id: str | None = None

    with pytest.raises(ConfigError, match="write log_to_wandb: false; eval_every: 3000; wandb_log"):
        config(logger=LoggingConfig())


def test_a_warm_up_that_never_ends_is_warned_of():
    # 8 steps of 1,024 tokens
    run = dict(training_tokens=8192, train_batch_size=1024)
    assert cautions(config(lr_warm_up_steps=7, **run)) == []
    (said,) = cautions(config(lr_warm_up_steps=8, **run))
    assert "after 8 steps" in said
    assert cautions(config(lr_warm_up_steps=8, lr_scheduler_name="constant", **run)) == []


def test_a_window_in_which_nothing_can_die_is_warned_of():
    run = dict(training_tokens=8192, train_batch_size=1024)
    assert cautions(config(dead_feature_window=8, **run)) == []  # nothing is done with it
    (said,) = cautions(config(dead_feature_window=8, use_ghost_grads=True, **run))
    assert "before any feature counts as dead, so use_ghost_grads does nothing" in said
    assert cautions(config(use_ghost_grads=True, **run)) == []
    # By default a tenth of the steps, as far as the guide's 1000.
    assert [config(training_tokens=4096 * n).dead_feature_window for n in (5, 488, 90_000)] == [
        1, 48, 1000,
    ]  # fmt: skip
    assert config(recipe="guide-2024").dead_feature_window == 1000
    with pytest.raises(ConfigError, match="dead_feature_window = 0: at least 1"):
        config(dead_feature_window=0)


def test_missing_fields_are_named():
    with pytest.raises(ConfigError, match="hook_point, dataset_path must be given"):
        LanguageModelSAERunnerConfig(model_name="m")
    with pytest.raises(ConfigError, match="hook_point, dataset_path must be given"):
        LanguageModelSAERunnerConfig.from_dict({"model_name": "m"})


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
    # 64 windows of 128 tokens: 8,192 are evaluated on once 200 times as many were trained on, which
    # takes 400 batches of 4,096; then at the next step that has a line in the log.
    assert config(wandb_log_frequency=10).resolved_eval_every == 400
    assert config(wandb_log_frequency=30).resolved_eval_every == 420
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


def test_the_first_gpu_of_an_actor_is_cuda():
    import torch

    for device in ("cuda", "cuda:0", torch.device("cuda", 0)):
        assert config(device=device).device == "cuda"
    for s in expand(config(device="cuda:0", lr=[1e-3, 2e-3])):
        assert s.config.device == "cuda"
    assert stream_key(resolve(config(device="cuda:0"))) == stream_key(
        resolve(config(device="cuda"))
    )


def test_plain_data_and_back():
    c = config(lr=[1e-3, 2e-3], resources=Resources(harvesters=2))
    assert LanguageModelSAERunnerConfig.from_dict(c.to_dict()) == c


def test_what_changes_the_stream_changes_its_key():
    base = resolve(config())
    for changes in (dict(context_size=64), dict(data_seed=1), dict(activation_dtype="bfloat16")):
        assert stream_key(base.replace(**changes)) != stream_key(base)
    for changes in (dict(lr=1.0), dict(seed=5), dict(hook_point="blocks.1.hook_resid_pre")):
        changed = base.replace(hook_point_layer=None, **changes)
        assert stream_key(changed) == stream_key(base)


@pytest.mark.parametrize(
    ("given", "dtype", "on_cpu", "on_cuda"),
    [
        ("auto", "float32", "float32", "bfloat16"),
        ("auto", "float64", "float64", "float64"),
        ("tf32", "float32", "float32", "tf32"),
        ("bfloat16", "float32", "bfloat16", "bfloat16"),
        ("float32", "float32", "float32", "float32"),
    ],
)
def test_what_products_are_made_in_is_a_matter_of_the_device(given, dtype, on_cpu, on_cuda):
    c = config(compute_dtype=given, dtype=dtype)
    assert c.computes_in("cpu") == on_cpu
    assert c.computes_in("cuda") == on_cuda
