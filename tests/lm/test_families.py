"""Every family of models that TransformerLens and Hugging Face both know, tiny, against HF eager.

Random weights, 2 layers, 32 wide; loaded from a folder by what harvesters load theirs with.
"""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from saeray.errors import ConfigError
from saeray.lm.model import LanguageModel
from saeray.spec.config import LanguageModelSAERunnerConfig

SIZES = dict(
    vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
GROUPED = dict(num_key_value_heads=2, head_dim=8)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
# Hidden states begin with the first layer's output here, elsewhere with the embedding.
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "rwkv")
RECURRENT = (*STATE_SPACE, "jamba", "qwen3_next", "recurrent_gemma", "qwen3_5_text", "lfm2")
WITHOUT_LIMIT = ("bloom", "mamba")
FAMILIES = {
    "gpt2": {},
    "gpt_neo": dict(
        attention_types=[[["global", "local"], 1]], num_layers=2, num_heads=4, window_size=8
    ),
    "gpt_neox": {},
    "llama": GROUPED,
    "gemma2": GROUPED | dict(attn_logit_softcapping=1.0, sliding_window=8, query_pre_attn_scalar=8),
    "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
    "bloom": {},
    "mamba": dict(state_size=4),
}
SLOW_FAMILIES = {
    "gptj": dict(rotary_dim=4),
    "codegen": dict(rotary_dim=4),
    "gpt_bigcode": {},
    "mistral": GROUPED | dict(sliding_window=8),
    "ministral3": GROUPED | dict(sliding_window=8),
    "mixtral": GROUPED | EXPERTS,
    "qwen2": GROUPED,
    "qwen2_moe": GROUPED | EXPERTS | dict(shared_expert_intermediate_size=16),
    "qwen3": GROUPED,
    "qwen3_moe": GROUPED | EXPERTS,
    "qwen3_next": GROUPED | EXPERTS,
    "gemma": GROUPED,
    "gemma3_text": GROUPED | dict(sliding_window=8, query_pre_attn_scalar=8),
    "vaultgemma": GROUPED | dict(attn_logit_softcapping=1.0, sliding_window=8),
    "phi": {},
    "phi3": GROUPED,
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED | dict(sliding_window=8),
    "olmoe": GROUPED | EXPERTS,
    "falcon": {},
    "falcon_mamba": dict(state_size=4),
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "gpt_oss": GROUPED | EXPERTS | dict(sliding_window=8),
    "granite": GROUPED,
    "cohere": GROUPED,
    "glm4": GROUPED,
    "nemotron": GROUPED,
    "smollm3": GROUPED,
    "mpt": dict(d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "xglm": dict(d_model=32, ffn_dim=64, num_layers=2, attention_heads=4),
    "jamba": GROUPED | dict(num_experts=2, mamba_d_state=4),
    "recurrent_gemma": GROUPED,
    "mamba2": dict(state_size=4, num_heads=8, head_dim=8, n_groups=1),
    "rwkv": dict(attention_hidden_size=32),
    "afmoe": GROUPED,
    "apertus": GROUPED,
    "arcee": GROUPED,
    "bitnet": GROUPED,
    "cohere2": GROUPED,
    "ernie4_5": GROUPED,
    "exaone4": GROUPED,
    "flex_olmo": GROUPED | EXPERTS,
    "gemma4_text": GROUPED,
    "glm": GROUPED,
    "granitemoe": GROUPED | EXPERTS,
    "hunyuan_v1_dense": GROUPED,
    "jais2": GROUPED,
    "lfm2": GROUPED,
    "llama4_text": GROUPED | EXPERTS,
    "minimax_m2": GROUPED | EXPERTS,
    "modernbert-decoder": {},
    "nanochat": GROUPED,
    "qwen3_5_text": GROUPED,
    "seed_oss": GROUPED,
}


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


def saved(folder, tiny, family, **fields):
    """A model of that family with random weights, in a folder, with the bundled tokenizer."""
    given = SIZES | (FAMILIES | SLOW_FAMILIES)[family] | fields
    if family in WITHOUT_LIMIT:
        del given["max_position_embeddings"]
    config = AutoConfig.for_model(family, **given)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if family not in RECURRENT:
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.mul_(4)  # so that attention is far from uniform, and what it loses shows
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny["model_name"]) / name, folder / name)
    return folder


def hugging_face(folder, tokens):
    """(hidden state after each layer but the last, logits) of the eager forward."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
    first = 0 if model.config.model_type in STATE_SPACE else 1
    return out.hidden_states[first:-1], out.logits


def loaded(tiny, folder, hook_points, **fields):
    fields = dict(model_name=str(folder), context_size=24) | fields
    return LanguageModel(LanguageModelSAERunnerConfig(**(tiny | fields)), hook_points)


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW_FAMILIES)]
)
def test_hidden_states_and_logits_are_hugging_faces(tiny, tmp_path, tokens, family):
    hidden, logits = hugging_face(saved(tmp_path, tiny, family), tokens)
    hooks = [f"blocks.{i}.hook_resid_post" for i in range(len(hidden))]
    assert hooks
    model = loaded(tiny, tmp_path, [*hooks, "blocks.1.hook_resid_post"])
    assert model.facts.fast_path
    got = model.activations(tokens)
    for hook, want in zip(hooks, hidden, strict=True):
        torch.testing.assert_close(got[hook].view_as(want), want, rtol=1e-3, atol=1e-3)
    # What comes after the last layer, too, and without a hook in the way.
    torch.testing.assert_close(model.logits(tokens), logits, rtol=1e-3, atol=1e-3)


def test_sdpa_is_asked_of_those_that_have_it(tiny, tmp_path):
    hook = "blocks.0.hook_resid_post"
    for family, attention in (("llama", "sdpa"), ("gemma2", "eager")):
        folder = saved(tmp_path / family, tiny, family)
        assert loaded(tiny, folder, [hook]).model.config._attn_implementation == attention


def test_soft_capping_is_more_than_the_tolerance_here(tiny, tmp_path, tokens):
    (with_cap,), _ = hugging_face(saved(tmp_path / "with", tiny, "gemma2"), tokens)
    without = saved(tmp_path / "without", tiny, "gemma2", attn_logit_softcapping=None)
    (without_cap,), _ = hugging_face(without, tokens)
    assert (with_cap - without_cap).abs().max() > 0.05


def test_a_model_that_is_no_causal_one_is_refused(tiny, tmp_path):
    config = AutoConfig.for_model("t5", d_model=32, d_ff=64, num_layers=1, num_heads=2)
    config.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny["model_name"]) / name, tmp_path / name)
    with pytest.raises(ConfigError, match=r"model_name = .* can't be loaded"):
        loaded(tiny, tmp_path, ["blocks.0.hook_resid_post"])


def test_a_family_that_transformer_lens_does_not_know_is_refused(tiny, tmp_path):
    config = AutoConfig.for_model("ctrl", vocab_size=4096, n_embd=32, n_layer=1, n_head=2, dff=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny["model_name"]) / name, tmp_path / name)
    with pytest.raises(ConfigError, match=r"model_name = .* TransformerLens"):
        loaded(tiny, tmp_path, ["blocks.0.hook_resid_post"])


@pytest.mark.parametrize("family", WITHOUT_LIMIT)
def test_without_a_limit_any_context_size_is_taken(tiny, tmp_path, family):
    saved(tmp_path, tiny, family, **({"seq_length": 16} if family == "bloom" else {}))
    model = loaded(tiny, tmp_path, ["blocks.0.hook_resid_post"], context_size=2500)
    assert model.facts.d_in == {"blocks.0.hook_resid_post": 32}


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # a table; what it was trained on
def test_with_a_limit_more_is_refused(tiny, tmp_path, family):
    saved(tmp_path, tiny, family)
    with pytest.raises(ConfigError, match=r"context_size = 65: .* takes at most 64 tokens"):
        loaded(tiny, tmp_path, ["blocks.0.hook_resid_post"], context_size=65)


def test_a_limit_that_is_not_declared_shows_before_the_start(tiny, tmp_path, monkeypatch):
    saved(tmp_path, tiny, "gpt2")
    monkeypatch.setattr("saeray.lm.model.context_limit", lambda config: None)
    with pytest.raises(ConfigError, match=r"context_size = 65: .* can't take that many tokens"):
        loaded(tiny, tmp_path, ["blocks.0.hook_resid_post"], context_size=65)
