"""The fields of sae_lens 6.54.12's training configs, and the table of docs/from-sae-lens.md.

    python tests/support/sae_lens_fields.py        # writes the table into the page

What becomes of a field is read from `saeray.spec.guide` and the config; `NOTES` says what the same
name, or another one, does not say by itself.
"""

import dataclasses
import re

from support.bundled import ROOT

from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.spec.guide import ALIASES, FOREIGN

PAGE = ROOT / "docs" / "from-sae-lens.md"
BETWEEN = re.compile(r"(<!-- fields -->\n).*?(<!-- /fields -->)", re.DOTALL)

FIELDS = {
    "LanguageModelSAERunnerConfig": (
        "model_name model_class_name hook_name hook_eval hook_head_index dataset_path "
        "dataset_trust_remote_code streaming is_dataset_tokenized use_chat_formatting context_size "
        "use_cached_activations cached_activations_path from_pretrained_path n_batches_in_buffer "
        "training_tokens store_batch_size_prompts seqpos_slice disable_concat_sequences "
        "sequence_separator_token activations_mixing_fraction device llm_device act_store_device "
        "prefetch_llm_batches seed dtype prepend_bos autocast autocast_lm compile_llm "
        "llm_compilation_mode compile_sae sae_compilation_mode train_batch_size_tokens adam_beta1 "
        "adam_beta2 lr lr_scheduler_name lr_warm_up_steps lr_end lr_decay_steps n_restart_cycles "
        "dead_feature_window feature_sampling_window dead_feature_threshold n_eval_batches "
        "eval_batch_size_prompts n_checkpoints checkpoint_path save_final_checkpoint output_path "
        "resume_from_checkpoint verbose model_kwargs model_from_pretrained_kwargs sae_lens_version "
        "sae_lens_training_version exclude_special_tokens n_batches_for_norm_estimate"
    ),
    "sae: all": (
        "d_in d_sae dtype device apply_b_dec_to_input normalize_activations reshape_activations "
        "metadata decoder_init_norm"
    ),
    "sae: standard, gated": "l1_coefficient lp_norm l1_warm_up_steps",
    "sae: topk, batchtopk, matryoshka": (
        "k use_sparse_activations aux_loss_coefficient rescale_acts_by_decoder_norm "
        "topk_threshold_lr matryoshka_widths use_matryoshka_aux_loss"
    ),
    "sae: jumprelu": (
        "jumprelu_init_threshold jumprelu_bandwidth jumprelu_sparsity_loss_mode l0_coefficient "
        "l0_warm_up_steps pre_act_loss_coefficient jumprelu_tanh_scale jumprelu_ste_to_input "
        "target_l0"
    ),
    "logger": (
        "log_to_wandb log_activations_store_to_wandb log_optimizer_state_to_wandb "
        "log_weights_to_wandb wandb_project wandb_id run_name wandb_entity wandb_log_frequency "
        "eval_every_n_wandb_logs"
    ),
}
# What a field of the same name, or another, does not say by itself.
NOTES = {
    "dtype": "of the SAE alone: the language model's and the buffer's is `activation_dtype`",
    "lr_end": "a fraction of `lr`; theirs is a rate, and a tenth of lr where it is not given",
    "lr_scheduler_name": "default: constantwithwarmup",
    "lr_warm_up_steps": "not given: the recipe's",
    "lr_decay_steps": "not given: the recipe's",
    "l1_warm_up_steps": "not given: the recipe's",
    "decoder_init_norm": "not given: the recipe's",
    "streaming": "not given: hub names and URIs stream, local files do not",
    "is_dataset_tokenized": "not given: told from the columns",
    "normalize_activations": "`none` and `expected_average`, which is `expected_average_only_in`",
    "l1_coefficient": "with `recipe: sae_lens` the same number means the same",
    "jumprelu_sparsity_loss_mode": "not given: `quadratic` beside a `target_l0`, else `step`",
    "matryoshka_widths": "text: `64,256`; a list is a grid axis",
    "dead_feature_window": "not given: a tenth of the steps, at most 1,000",
    "target_l0": "for every architecture ([architectures.md](architectures.md))",
    "device": "not given: `auto`",
    "log_weights_to_wandb": "default: false",
    "wandb_project": "default: saeray",
    "checkpoint_path": "where results go when `storage_path` is not given",
    "from_pretrained_path": "also a name on the hub",
}


def becomes(field):
    """What a field of theirs is here, for a cell of the table."""
    known = {f.name for f in dataclasses.fields(LanguageModelSAERunnerConfig)}
    note = NOTES.get(field, "")
    if field in known:
        return "the same" + (f"; {note}" if note else "")
    if field in ALIASES:
        return f"`{ALIASES[field]}`" + (f"; {note}" if note else "")
    foreign = FOREIGN[field]
    if foreign.same is None:
        return "leave it out: it changes no SAE here"
    said = foreign.remedy.rstrip(".")
    same = [
        s for s in foreign.same if s is not None and s != {} and not isinstance(s, list | tuple)
    ]
    taken = f" (taken where it is {' or '.join(f'`{s}`' for s in same)})" if same else ""
    return said.replace("|", "\\|") + taken


def table():
    lines = ["| sae_lens 6.54.12 | here |", "|---|---|"]
    for group, names in FIELDS.items():
        lines.append(f"| **{group}** | |")
        lines += [f"| `{name}` | {becomes(name)} |" for name in names.split()]
    return "\n".join(lines) + "\n"


def with_table(text):
    return BETWEEN.sub(lambda found: found[1] + table() + found[2], text)


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
