"""Keywords of the guide's own code, and of what came after it, that no field here has.

Some are other names of a field. The rest are taken where they ask for what is done anyway, and
refused with what to write instead where they do not: nothing is ignored that would change an SAE.
What sae_lens nests (`sae:`, `logger:`) is refused with the lines to write in its place, since the
same numbers mean something else under another recipe.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from saeray.errors import ConfigError, bad_value

ALIASES = {
    "total_training_tokens": "training_tokens",
    "from_pretrained_path": "init_from",
    "hook_name": "hook_point",
    "hook_layer": "hook_point_layer",
    "hook_name_out": "hook_point_out",
    "out_hook_point": "hook_point_out",
    "store_batch_size_prompts": "store_batch_size",
    "train_batch_size_tokens": "train_batch_size",
    "train_batch_size_samples": "train_batch_size",
    "total_training_samples": "training_tokens",
    "n_restart_cycles": "num_cycles",
    "topk_threshold_lr": "topk_threshold_rate",
}
# Plain words for a field: never taken, since they may mean more than one thing, but known.
WORDS = {
    "learning_rate": ("lr",),
    "batch_size": ("train_batch_size (tokens per step)", "store_batch_size (contexts per forward)"),
    "model": ("model_name",),
    "dataset": ("dataset_path",),
    "layer": ("hook_point_layer",),
    "hook": ("hook_point",),
    "sparsity_coefficient": ("l1_coefficient",),
    "sparsity_penalty": ("l1_coefficient",),
    "l1_penalty": ("l1_coefficient",),
    "total_tokens": ("training_tokens",),
    "num_tokens": ("training_tokens",),
    "dict_size": ("expansion_factor (d_sae = d_in * expansion_factor)",),
    "n_features": ("expansion_factor (d_sae = d_in * expansion_factor)",),
    "steps": ("training_tokens (steps = training_tokens // train_batch_size)",),
    "optimizer": ("adam_beta1", "adam_beta2"),
}
NEAR = 0.75  # of `difflib`, 1 being the same: below it a guess is far-fetched


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
MODEL = "write model_revision, activation_dtype or trust_remote_code."
RESUME = "saeray sweep --resume DIR goes on with a sweep."
NESTED = ("sae", "logger")  # what sae_lens keeps in dataclasses of their own
START = Foreign((False,), "write encoder_init, decoder_init_norm or a recipe.")
FOREIGN = {
    "use_cached_activations": CACHE,
    "cached_activations_path": CACHE,
    "hook_point_head_index": HEAD,
    "hook_head_index": HEAD,
    "is_transcoder": Foreign((False, None), "write hook_point_out: the hook to reconstruct."),
    "is_skip_transcoder": Foreign((False, None), "write skip_connection: true."),
    "d_out": Foreign((None,), "it is asked of the model, at hook_point_out; leave it out."),
    "hook_layer_out": Foreign((None,), "write the layer in hook_point_out."),
    "out_hook_point_layer": Foreign((None,), "write the layer in hook_point_out."),
    "hook_head_index_out": HEAD,
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
    "d_sae": Foreign((None,), "write expansion_factor = d_sae / d_in: 8 for 1,024 of d_in 128."),
    "run_name": Foreign((None,), "write name: of the sweep; runs are called after their SAEs."),
    "seqpos_slice": Foreign(
        (None, (None,), [None]),
        "write context_slice: [first, last], whose last position is served too: (5, -5) of "
        "sae_lens is [5, -6].",
    ),
    "n_eval_batches": Foreign((), "write eval_windows: contexts that are set aside."),
    "eval_batch_size_prompts": Foreign((None,), "write eval_windows: contexts set aside."),
    "act_store_device": Foreign(("with_model", None), "Ray keeps activations in main memory."),
    "autocast": PRECISION,
    "autocast_lm": PRECISION,
    "compile_llm": PRECISION,
    "compile_sae": PRECISION,
    "llm_compilation_mode": Foreign((None,), "nothing is compiled."),
    "sae_compilation_mode": Foreign((None,), "nothing is compiled."),
    # Of sae_lens from version 6 on.
    "model_class_name": Foreign(("HookedTransformer", None), "causal models only, by model_name."),
    "model_kwargs": Foreign(({}, None), MODEL),
    "model_from_pretrained_kwargs": Foreign(({}, None), MODEL),
    "dataset_trust_remote_code": Foreign((False, None), "write trust_remote_code."),
    "use_chat_formatting": Foreign((False,), "give dataset_path the formatted text."),
    "disable_concat_sequences": Foreign((False,), "documents are packed into windows."),
    "sequence_separator_token": Foreign(("bos",), "prepend_bos says whether BOS parts documents."),
    "activations_mixing_fraction": Foreign((0.5,), "half of each half buffer waits for the next."),
    "llm_device": Foreign((None,), "write device."),
    "prefetch_llm_batches": Foreign(None),  # harvesters are ahead anyway
    "n_batches_for_norm_estimate": Foreign((1000,), "write b_dec_init_rows: rows of the sample."),
    "hook_eval": Foreign(("NOT_IN_USE", None), "SAEs are evaluated at their hook_point."),
    "reshape_activations": Foreign(
        ("none", "hook_z", None), "heads are joined where there are any."
    ),
    "aux_loss_coefficient": Foreign(
        (), "write auxk_coefficient, with auxk_scaling: dead_share, which is sae_lens's."
    ),
    "rescale_acts_by_decoder_norm": Foreign((False,), "decoder_norm: unit makes it superfluous."),
    "use_matryoshka_aux_loss": Foreign((False,), "write auxk_coefficient."),
    "l0_warm_up_steps": Foreign((), "write l1_warm_up_steps: it is of every sparsity coefficient."),
    "finetuning_tokens": Foreign((0, None), "there is no fine-tuning; init_from goes on."),
    "finetuning_method": Foreign((None,), "there is no fine-tuning; init_from goes on."),
    "activation_fn": Foreign(("relu", None), "write architecture."),
    "activation_fn_str": Foreign(("relu", None), "write architecture."),
    "output_path": Foreign((None,), "write storage_path, and name."),
    "resume_from_checkpoint": Foreign((None,), RESUME),
    "resume": Foreign((False, None), RESUME),
    "wandb_id": Foreign((None,), "each SAE's run has an id of its sweep's own."),
    "eval_every_n_wandb_logs": Foreign(
        (), "write eval_every: optimizer steps, so wandb_log_frequency times as many."
    ),
    "save_final_checkpoint": Foreign(None),  # final/ is always there
    "log_activations_store_to_wandb": Foreign(None),
    "log_optimizer_state_to_wandb": Foreign(None),
    "use_sparse_activations": Foreign(None),
    "metadata": Foreign(None),
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
        if key in NESTED and key not in known:
            raise ConfigError(f"{key}: {flat(key, given, known)}")
        foreign = FOREIGN.get(key)
        if foreign is not None and key not in known:
            if foreign.same is not None and not any(is_same(value, s) for s in foreign.same):
                remedy = f"write {expansion(given)}." if expansion(given) and key == "d_sae" else ""
                raise bad_value(key, value, f"can't be asked for: {remedy or foreign.remedy}")
            continue
        name = ALIASES.get(key, key)
        if name not in known:
            raise ConfigError(f"unknown key {key!r}; {meant(str(key), known)}")
        if name in values:
            raise ConfigError(f"{name} is given twice, once under another name.")
        values[name] = value
    return values


def is_same(value: Any, meant: Any) -> bool:
    """1 and 1.0 are the same, True and 1 are not."""
    return isinstance(value, bool) == isinstance(meant, bool) and bool(value == meant)


def meant(word: str, known: Iterable[str]) -> str:
    """What an unknown key may stand for: a near name, one that begins or ends so, or nothing."""
    known = sorted(known)
    plain = bare(word)
    if plain in (words := {bare(w): names for w, names in WORDS.items()}):
        return f"write {' or '.join(words[plain])}."
    near = difflib.get_close_matches(plain, [bare(k) for k in known], n=3, cutoff=NEAR)
    found = [k for n in near for k in known if bare(k) == n]
    if len(plain) >= 4:
        found += [k for k in known if plain in bare(k) and k not in found]
    if found:
        return f"did you mean {' or '.join(found[:3])}?"
    return "no field is called like that; `saeray fields` and docs/config.md have all of them."


def bare(word: str) -> str:
    return re.sub(r"[^a-z0-9]", "", word.lower())


def expansion(given: Mapping[str, Any]) -> str:
    """The line in the place of d_sae, where d_in is given too."""
    d_in, d_sae = given.get("d_in"), given.get("d_sae")
    if isinstance(d_in, int) and isinstance(d_sae, int) and d_in > 0:
        return f"expansion_factor: {d_sae / d_in:g}"
    return ""


def flat(group: str, given: Mapping[str, Any], known: Iterable[str]) -> str:
    """What to write in the place of what sae_lens nests."""
    inner = given[group]
    if dataclasses.is_dataclass(inner) and not isinstance(inner, type):
        kind = getattr(inner, "architecture", None)  # of sae_lens's classes
        of_class = {"architecture": kind()} if callable(kind) else {}
        inner = of_class | {f.name: getattr(inner, f.name) for f in dataclasses.fields(inner)}
    if not isinstance(inner, Mapping):
        return f"there is no {group} here; fields stand flat."
    known, lines, unsaid = set(known), list[str](), list[str]()
    if group == "sae" and "recipe" not in given:
        lines.append("recipe: sae_lens")  # of which its coefficients are
    for key, value in inner.items():
        foreign, name = FOREIGN.get(key), ALIASES.get(key, key)
        factor = expansion({**given, **inner})
        if key == "d_sae" and factor:
            lines.append(factor)
        elif key == "eval_every_n_wandb_logs":
            lines.append(f"eval_every: {value * inner.get('wandb_log_frequency', 10)}")
        elif name in known:
            if value is not None:
                lines.append(f"{name}: {str(value).lower() if isinstance(value, bool) else value}")
        elif foreign is None:
            unsaid.append(f"{key}: {meant(str(key), known)}")
        elif foreign.same is not None and not any(is_same(value, s) for s in foreign.same):
            unsaid.append(f"{key}: {foreign.remedy}")
    said = f"fields stand flat here; in its place write {'; '.join(lines or ['nothing'])}"
    return ". ".join([said, *(u.rstrip(".") for u in unsaid)]) + "."
