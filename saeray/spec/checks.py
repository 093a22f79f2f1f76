"""Checks of a config's fields: types, ranges, choices. Each error names field, value and remedy.

The checks that need the model or the text are made where these are loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from saeray.errors import bad_value, nearest
from saeray.spec import architectures
from saeray.spec.architectures import check_own_values
from saeray.spec.features import check_features
from saeray.spec.stream import check_rows
from saeray.spec.synthetic import check_synthetic, is_synthetic
from saeray.spec.transcoder import check_transcoder

if TYPE_CHECKING:
    from saeray.spec.config import LanguageModelSAERunnerConfig

AUTO = "auto"
LR_SCHEDULERS = (
    "constant",
    "constantwithwarmup",
    "linearwarmupdecay",
    "cosineannealing",
    "cosineannealingwarmup",
    "cosineannealingwarmrestarts",
)
B_DEC_INIT_METHODS = ("geometric_median", "mean", "zeros")
MSE_NORMALIZATIONS = ("centred_norm", "none", "sum")
ENCODER_INITS = ("decoder_transpose", "independent")
DECODER_NORMS = ("unit", "free")
ACTIVATION_NORMALIZATIONS = ("none", "expected_average")
FLOAT_DTYPES = ("float32", "float64")
COMPUTE_DTYPES = (AUTO, "float32", "tf32", "bfloat16")
# Fields that do something for dead features.
REMEDIES = (
    "use_ghost_grads", "auxk_coefficient", "pre_act_loss_coefficient", "feature_sampling_method"
)  # fmt: skip
TXT_DOCUMENTS = ("blank_line", "file", "line")
TEXT_VERSIONS = (1, 2)
ACTIVATION_DTYPES = ("float32", "float16", "bfloat16")


def check_types(config: Any, prefix: str = "") -> None:
    """Every value (or every element of a grid axis) must have its field's type.

    A whole number is accepted for a float, and for an int a float that is whole (YAML reads 3e8
    as a float or even a string); it is stored as the field's own type.
    """
    hints = get_type_hints(type(config))
    for f in fields(config):
        allowed = allowed_types(hints[f.name])
        value = getattr(config, f.name)
        if isinstance(value, list):
            checked: Any = [of_type(prefix + f.name, v, allowed) for v in value]
        else:
            checked = of_type(prefix + f.name, value, allowed)
        object.__setattr__(config, f.name, checked)


def allowed_types(hint: Any) -> tuple[type, ...]:
    if get_origin(hint) is dict:
        return (dict,)
    return get_args(hint) if get_origin(hint) is not None else (hint,)


def of_type(name: str, value: Any, allowed: tuple[type, ...]) -> Any:
    if isinstance(value, str) and str in allowed and (int in allowed or float in allowed):
        try:
            value = float(value)
        except ValueError:
            return value  # a word, like auto
    if type(value) in allowed:
        if isinstance(value, float) and not math.isfinite(value):
            raise bad_value(name, value, "a finite number.")
        return value
    if isinstance(value, str) and (int in allowed or float in allowed):
        try:
            value = float(value)  # YAML 1.1 reads `4e-4` as a string
        except ValueError:
            pass
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if int in allowed and float(value).is_integer():
            return int(value)
        if float in allowed and math.isfinite(value):
            return float(value)
    words = {
        int: "a whole number", float: "a number", str: "text", bool: "true or false",
        dict: "`name: value` pairs", tuple: "a list",
    }  # fmt: skip
    what = " or ".join(words.get(t, "none" if t is type(None) else t.__name__) for t in allowed)
    raise bad_value(name, value, f"{what} is wanted here, not {type(value).__name__}.")


def check_counts(config: LanguageModelSAERunnerConfig) -> None:
    """What has to be 1 at least; before anything is derived from it."""
    at_least_one = (
        "context_size train_batch_size training_tokens n_batches_in_buffer store_batch_size "
        "feature_sampling_window eval_windows wandb_log_frequency "
        "b_dec_init_rows num_cycles"
    )
    for name in at_least_one.split():
        if getattr(config, name) < 1:
            raise bad_value(name, getattr(config, name), "at least 1.")


def check_values(config: LanguageModelSAERunnerConfig) -> None:
    """The checks that need one value per field; run for every point of a grid."""
    not_below_0 = (
        "lr_warm_up_steps lr_decay_steps l1_warm_up_steps n_checkpoints seed lr_end gradient_clip"
    )
    for name in not_below_0.split():
        if getattr(config, name) < 0:
            raise bad_value(name, getattr(config, name), "not below 0.")
    if config.dead_feature_window is not None and config.dead_feature_window < 1:
        raise bad_value("dead_feature_window", config.dead_feature_window, "at least 1.")
    above_0 = "lr expansion_factor wait_limit_s reader_lag_s encoder_init_scale decoder_init_norm"
    for name in above_0.split():
        if getattr(config, name) <= 0:
            raise bad_value(name, getattr(config, name), "above 0.")
    if config.lr_end > 1:
        raise bad_value(
            "lr_end",
            config.lr_end,
            "a fraction of lr is wanted, 0 to 1: 0.1 ends at a tenth of it, whatever lr is.",
        )
    check_name(config.name)
    if config.checkpoint_every_s is not None and config.checkpoint_every_s <= 0:
        raise bad_value("checkpoint_every_s", config.checkpoint_every_s, "seconds, or none.")
    if config.eval_every is not None and config.eval_every < 0:
        raise bad_value("eval_every", config.eval_every, "optimizer steps, or 0: only at the end.")
    one_of("lr_scheduler_name", config.lr_scheduler_name, LR_SCHEDULERS)
    one_of("b_dec_init_method", config.b_dec_init_method, B_DEC_INIT_METHODS)
    one_of("mse_normalization", config.mse_normalization, MSE_NORMALIZATIONS)
    one_of("encoder_init", config.encoder_init, ENCODER_INITS)
    one_of("decoder_norm", config.decoder_norm, DECODER_NORMS)
    one_of("normalize_activations", config.normalize_activations, ACTIVATION_NORMALIZATIONS)
    if config.decoder_norm == "unit" and config.decoder_init_norm != 1:
        raise bad_value(
            "decoder_init_norm",
            config.decoder_init_norm,
            "rows of norm 1 are kept at 1 by decoder_norm: unit; use decoder_norm: free.",
        )
    if config.lr_decay_steps is not None and config.lr_decay_steps > config.steps:
        raise bad_value(
            "lr_decay_steps",
            config.lr_decay_steps,
            f"training has {config.steps} steps.",
        )
    check_own_values(config)
    check_precision(config)
    one_of("activation_dtype", config.activation_dtype, ACTIVATION_DTYPES)
    if config.txt_documents is not None:
        one_of("txt_documents", config.txt_documents, TXT_DOCUMENTS)
    if config.text_version not in TEXT_VERSIONS:
        raise bad_value("text_version", config.text_version, "1 or 2; leave it out.")
    check_device(config)
    if config.n_batches_in_buffer < 2:
        raise bad_value(
            "n_batches_in_buffer",
            config.n_batches_in_buffer,
            "at least 2, since every window mixes two halves of the buffer.",
        )
    if config.training_tokens < config.train_batch_size:
        raise bad_value(
            "training_tokens",
            config.training_tokens,
            f"less than one batch (train_batch_size = {config.train_batch_size}), so not a single "
            "step would be made; give at least that many.",
        )
    if config.stream_tokens is not None and config.stream_tokens < config.training_tokens:
        raise bad_value(
            "stream_tokens",
            config.stream_tokens,
            f"shorter than training_tokens = {config.training_tokens}; leave it out.",
        )
    check_rows(config)
    check_synthetic(config)
    check_features(config.features, has_text=not is_synthetic(config.model_name))
    check_hook_layer(config)
    check_transcoder(config)


NAME = re.compile(r"[^\W_][\w.+=,@ -]*")  # letters and digits of any script
NAME_BYTES = 200  # of 255 that file systems have, since files are written beside their place


def check_name(name: str | None) -> None:
    """A sweep's name is a folder's: one that stays inside storage_path, wherever that is."""
    if name is None:
        return
    if not NAME.fullmatch(name) or name.endswith(" ") or len(name.encode()) > NAME_BYTES:
        raise bad_value(
            "name",
            name,
            "a folder's name is wanted: letters, digits and . _ + = , @ - or spaces between them, "
            f"beginning with a letter or a digit, of at most {NAME_BYTES} bytes.",
        )


def cautions(config: LanguageModelSAERunnerConfig) -> list[str]:
    """What is odd about the config of one SAE, though it can be meant."""
    found = []
    assert config.lr_scheduler_name is not None
    warms_up = config.lr_scheduler_name.endswith("warmup") or (
        config.lr_scheduler_name == "linearwarmupdecay"
    )
    assert config.lr_warm_up_steps is not None and config.l1_warm_up_steps is not None
    if config.l1_warm_up_steps >= config.steps:
        found.append(
            f"l1_warm_up_steps = {config.l1_warm_up_steps:,}: training ends after "
            f"{config.steps:,} steps, before the coefficient is reached."
        )
    if warms_up and config.lr_warm_up_steps >= config.steps:
        found.append(
            f"lr_warm_up_steps = {config.lr_warm_up_steps:,}: training ends after "
            f"{config.steps:,} steps (training_tokens // train_batch_size), before lr is "
            "reached; lower it, or train on more tokens."
        )
    revives = [n for n in REMEDIES if getattr(config, n)]
    assert config.dead_feature_window is not None
    if revives and config.dead_feature_window >= config.steps:
        found.append(
            f"dead_feature_window = {config.dead_feature_window:,}: training ends after "
            f"{config.steps:,} steps, before any feature counts as dead, so {revives[0]} does "
            "nothing; lower it, or leave it out."
        )
    return found + architectures.cautions(config)


def check_device(config: LanguageModelSAERunnerConfig) -> None:
    """A kind of device, stored without the 0 of its first one."""
    kind, colon, number = config.device.partition(":")
    if kind not in (AUTO, "cpu", "cuda", "mps") or (colon and not number.isdigit()):
        raise bad_value("device", config.device, "cpu, cuda, mps or auto.")
    if colon and (int(number) > 0 or kind == AUTO):
        raise bad_value(
            "device",
            config.device,
            f"write {kind}: Ray shows each actor only the GPUs it has reserved for it, and each "
            "takes the first of them. Which ones there are is said by CUDA_VISIBLE_DEVICES when "
            "Ray starts; on which nodes, by resources.harvester_labels and trainer_labels.",
        )
    object.__setattr__(config, "device", kind)
    if kind == "mps" and config.dtype == "float64":
        raise bad_value("dtype", config.dtype, "device mps has none; float32.")


def check_precision(config: LanguageModelSAERunnerConfig) -> None:
    """What an SAE is kept in, and what its products are made in."""
    if config.dtype in ("float16", "bfloat16"):
        raise bad_value(
            "dtype",
            config.dtype,
            "weights, sums and Adam's moments in half precision train badly or not at all. "
            "compute_dtype: bfloat16 has the same speed, with those in float32.",
        )
    one_of("dtype", config.dtype, FLOAT_DTYPES)
    if config.compute_dtype == "float16":
        raise bad_value(
            "compute_dtype", config.compute_dtype, "gradients underflow there; bfloat16."
        )
    one_of("compute_dtype", config.compute_dtype, COMPUTE_DTYPES)
    if config.dtype == "float64" and config.compute_dtype in ("tf32", "bfloat16"):
        raise bad_value(
            "compute_dtype",
            config.compute_dtype,
            "dtype: float64 would be for nothing; dtype: float32, or compute_dtype: auto.",
        )


def one_of(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = nearest(str(value), choices)
        raise bad_value(name, value, f"one of {', '.join(choices)}; {near}")


def check_hook_layer(config: LanguageModelSAERunnerConfig) -> None:
    """`hook_point_layer` must agree with the layer in `hook_point`."""
    if "{layer}" in config.hook_point:
        if config.hook_point_layer is None:
            raise bad_value(
                "hook_point_layer", None, f"{config.hook_point} needs a layer to fill in."
            )
        return
    parts = config.hook_point.split(".")
    layer = int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None
    if config.hook_point_layer is None:
        object.__setattr__(config, "hook_point_layer", layer)
    elif layer is not None and layer != config.hook_point_layer:
        raise bad_value(
            "hook_point_layer",
            config.hook_point_layer,
            f"hook_point = {config.hook_point!r} is in layer {layer}; make them agree, or write "
            "the layer as {layer}.",
        )
