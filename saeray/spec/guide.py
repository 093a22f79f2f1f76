"""Keywords of the guide's own code, and of what came after it, that no field here has.

Some are other names of a field. The rest are taken where they ask for what is done anyway, and
refused with what to write instead where they do not: nothing is ignored that would change an SAE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from saeray.errors import ConfigError, bad_value, nearest

ALIASES = {
    "total_training_tokens": "training_tokens",
    "from_pretrained_path": "init_from",
    "hook_name": "hook_point",
    "hook_layer": "hook_point_layer",
    "store_batch_size_prompts": "store_batch_size",
    "train_batch_size_tokens": "train_batch_size",
}


class Foreign(NamedTuple):
    """A keyword that no field has."""

    same: tuple[Any, ...] | None  # the values that say what is done anyway; None: all of them
    remedy: str = ""


CACHE = Foreign((False, None), "activation_cache: PATH keeps activations and reads them again.")
HEAD = Foreign((None,), "one head is no hook point; hook_z has all heads of a layer.")
PRECISION = Foreign(
    (False,),
    "compute_dtype says in which precision an SAE is trained, activation_dtype in which the "
    "language model runs.",
)
START = Foreign((False,), "write encoder_init, decoder_init_norm or a recipe.")
FOREIGN = {
    "use_cached_activations": CACHE,
    "cached_activations_path": CACHE,
    "hook_point_head_index": HEAD,
    "hook_head_index": HEAD,
    "lp_norm": Foreign((1,), "the sparsity loss is the L1 norm."),
    "noise_scale": Foreign((0,), "no noise is added to the activations of features."),
    "normalize_sae_decoder": Foreign((), "write decoder_norm: unit or free."),
    "apply_b_dec_to_input": Foreign((True,), "b_dec is subtracted from the input."),
    "init_encoder_as_decoder_transpose": Foreign(
        (), "write encoder_init: decoder_transpose or independent."
    ),
    "decoder_orthogonal_init": START,
    "decoder_heuristic_init": START,
    "mse_loss_normalization": Foreign((), "write mse_normalization: centred_norm, none or sum."),
    "d_sae": Foreign((None,), "write expansion_factor: d_sae = d_in * expansion_factor."),
    "run_name": Foreign((None,), "write name: of the sweep; runs are called after their SAEs."),
    "n_eval_batches": Foreign((), "write eval_windows: contexts that are set aside."),
    "eval_batch_size_prompts": Foreign((None,), "write eval_windows: contexts set aside."),
    "act_store_device": Foreign(("with_model", None), "Ray keeps activations in main memory."),
    "autocast": PRECISION,
    "autocast_lm": PRECISION,
    "compile_llm": PRECISION,
    "compile_sae": PRECISION,
    # Of resampling, which feature_sampling_method chooses; of messages; of versions.
    "feature_reinit_scale": Foreign(None),
    "resample_batches": Foreign(None),
    "dead_feature_estimation_method": Foreign(None),
    "verbose": Foreign(None),
    "sae_lens_version": Foreign(None),
    "sae_lens_training_version": Foreign(None),
}


def in_our_words(given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """What is given by field, without keywords that ask for what is done anyway.

    Raises:
        ConfigError: a keyword that no field has (with the nearest ones or with what to write), or
            one that is given twice.
    """
    known = set(known)
    values: dict[str, Any] = {}
    for key, value in given.items():
        foreign = FOREIGN.get(key)
        if foreign is not None and key not in known:
            if foreign.same is not None and not any(is_same(value, s) for s in foreign.same):
                raise bad_value(key, value, f"can't be asked for: {foreign.remedy}")
            continue
        name = ALIASES.get(key, key)
        if name not in known:
            raise ConfigError(f"unknown key {key!r}; {nearest(str(key), known)}")
        if name in values:
            raise ConfigError(f"{name} is given twice, once under another name.")
        values[name] = value
    return values


def is_same(value: Any, meant: Any) -> bool:
    """1 and 1.0 are the same, True and 1 are not."""
    return isinstance(value, bool) == isinstance(meant, bool) and bool(value == meant)
