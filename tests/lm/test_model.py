"""The language model: fast path against TransformerLens, hooks, splicing, evaluation."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from saeray.errors import ConfigError
from saeray.lm.evaluate import Evaluator, ce_loss_score
from saeray.lm.hooks import Probe, what_is_wrong
from saeray.lm.hub import load_tokenizer
from saeray.lm.model import LanguageModel, check_d_in
from saeray.sae.architectures.standard import StandardSAE
from saeray.sae.initial import initial_sae
from saeray.spec.config import LanguageModelSAERunnerConfig
from saeray.text.tokens import TokenWindows

HOOK = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(0))


def model_at(tiny, *hook_points, **changes):
    return LanguageModel(LanguageModelSAERunnerConfig(**(tiny | changes)), hook_points or [HOOK])


def transformer_lens(model_path, tokens, hook_points):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(model_path), device="cpu")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, names_filter=list(hook_points))
    return {h: cache[h].flatten(2).flatten(0, 1) for h in hook_points}


@pytest.mark.parametrize(
    "hook_points",
    [
        [HOOK],
        ["blocks.0.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.3.hook_resid_post"],
        ["blocks.1.hook_resid_mid"],
        ["blocks.1.mlp.hook_post"],
        ["blocks.1.attn.hook_z"],
    ],
)
def test_activations_are_transformer_lens_activations(tiny, tokens, hook_points):
    model = model_at(tiny, *hook_points)
    assert model.facts.fast_path
    got, want = model.activations(tokens), transformer_lens(tiny["model_name"], tokens, hook_points)
    for h in hook_points:
        assert got[h].shape == (4 * 64, model.facts.d_in[h])
        torch.testing.assert_close(got[h], want[h], rtol=1e-3, atol=1e-3)


def test_a_hook_the_fast_path_can_not_reach_takes_the_slow_one_and_says_so(tiny, tokens, caplog):
    name = "ln_final.hook_normalized"
    model = model_at(tiny, name)
    assert not model.facts.fast_path
    assert "run_with_cache, which is slower" in caplog.text
    want = transformer_lens(tiny["model_name"], tokens, [name])
    torch.testing.assert_close(model.activations(tokens)[name], want[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "architecture"),
    [
        (
            LlamaConfig(
                vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2,
            ),
            LlamaForCausalLM,
        ),
        (
            GPTNeoXConfig(
                vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                num_attention_heads=4,
            ),
            GPTNeoXForCausalLM,
        ),
    ],
)  # fmt: skip
def test_other_architectures(tiny, tmp_path, tokens, config, architecture):
    torch.manual_seed(0)
    architecture(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny["model_name"]) / name, tmp_path / name)
    model = model_at(tiny, HOOK, model_name=str(tmp_path))
    assert model.facts.fast_path
    want = transformer_lens(tmp_path, tokens, [HOOK])
    torch.testing.assert_close(model.activations(tokens)[HOOK], want[HOOK], rtol=1e-3, atol=1e-3)


def test_every_value_of_the_weights_and_the_config_is_in_the_fingerprint(tiny):
    model = model_at(tiny)
    full, sampled = model.fingerprints()
    again, _ = model_at(tiny).fingerprints()
    assert full == again

    embedding = model.model.get_input_embeddings().weight
    was = float(embedding[777, 5])
    embedding[777, 5] += 1e-3  # not among the 1,024 values that earlier versions read
    changed, same = model.fingerprints()
    assert same == sampled
    assert changed != full
    embedding[777, 5] = was
    assert model.fingerprints()[0] == full
    model.model.config.layer_norm_epsilon *= 2  # the same weights, another forward
    assert model.fingerprints()[0] != full


def test_the_fingerprint_is_of_what_was_loaded(tiny, tmp_path):
    copied = tmp_path / "elsewhere"
    shutil.copytree(tiny["model_name"], copied)
    full, _ = model_at(tiny).fingerprints()
    assert model_at(tiny, model_name=str(copied)).fingerprints()[0] == full
    half, _ = model_at(tiny, activation_dtype="bfloat16").fingerprints()
    assert half != full


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tiny, tokens, dtype):
    exact = model_at(tiny).activations(tokens)[HOOK]
    half = model_at(tiny, activation_dtype=dtype).activations(tokens)[HOOK]
    assert half.dtype == getattr(torch, dtype)
    assert float((half.float() - exact).norm() / exact.norm()) < 0.02


def test_bad_models_and_hooks(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean blocks\.2\.hook_resid_pre"):
        model_at(tiny, "blocks.2.hook_resid_prr")
    with pytest.raises(ConfigError, match=r"4 layers\) has no such hook"):
        model_at(tiny, "blocks.9.hook_resid_pre")
    with pytest.raises(ConfigError, match="no such directory"):
        model_at(tiny, model_name=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"no config\.json"):
        model_at(tiny, model_name=str(tmp_path))
    with pytest.raises(ConfigError, match=r"context_size = 512: .* at most 256"):
        model_at(tiny, context_size=512)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device = 'cuda': this machine has cpu"):
            model_at(tiny, device="cuda")


@pytest.mark.parametrize(
    ("hook_point", "words"),
    [
        (
            "blocks.1.attn.hook_pattern",
            r"not one vector per token .*\[2, 4, 16, 16\] for \[2, 16\] .* did you mean blocks\.1",
        ),
        ("blocks.1.attn.hook_attn_scores", "not one vector per token"),
        ("blocks.1.hook_mlp_in", r"never computed .* did you mean blocks\.1\."),
        ("blocks.1.attn.hook_result", "never computed"),
    ],
)
def test_a_hook_that_is_no_vector_per_token_is_refused(tiny, hook_point, words):
    with pytest.raises(ConfigError, match=f"hook_point = '{hook_point}': {words}"):
        model_at(tiny, HOOK, hook_point, d_in=16)


def test_heads_that_sae_lens_does_not_join_are_warned_of(tiny):
    model = model_at(tiny, "blocks.1.attn.hook_q", "blocks.1.attn.hook_z")
    (of_q,) = [w for w in model.facts.warnings if "sae_lens" in w]
    assert of_q.startswith("blocks.1.attn.hook_q: ")
    assert "4 heads of 32" in of_q


def test_heads_count_as_one_vector_and_two_lengths_tell_what_does_not():
    def probe(*shape, n=2, length=4, dtype=torch.float32):
        return Probe(torch.zeros(n, length), {"h": torch.zeros(*shape, dtype=dtype)})

    def fits(first, second, dtype=torch.float32):
        probes = [probe(*first, dtype=dtype), probe(*second, n=3, length=3, dtype=dtype)]
        return what_is_wrong("h", probes) is None

    assert fits((2, 4, 8), (3, 3, 8))
    assert fits((2, 4, 2, 8), (3, 3, 2, 8))
    assert not fits((2, 4, 4, 4), (3, 4, 3, 3))  # as many heads as tokens
    assert not fits((2, 4, 4), (3, 3, 3))  # something per pair of tokens
    assert not fits((1, 4, 8), (1, 3, 8))  # the same for every text
    assert not fits((8, 8), (9, 8))  # tokens of all texts in a row
    assert not fits((2, 4), (3, 3))  # a number
    assert not fits((2, 4, 8), (3, 3, 8), torch.int64)  # choices of experts


@pytest.mark.parametrize("at_start", [True, False])
def test_activations_beyond_float16_are_refused_by_their_dtype(tiny, tmp_path, tokens, at_start):
    with pytest.raises(ConfigError, match=r"activation_dtype = 'float16': .* bfloat16 or float32"):
        if at_start:
            model_at(tiny, model_name=str(scaled(tiny, tmp_path, 1e4)), activation_dtype="float16")
        else:  # in what no token of the start has shown
            model = model_at(tiny, activation_dtype="float16")
            model.model.get_input_embeddings().weight[int(tokens[3, 50])] = torch.inf
            model.activations(tokens)


def test_activations_that_are_not_finite_in_float32_are_no_matter_of_dtype(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"model_name = .* not finite"):
        model_at(tiny, model_name=str(scaled(tiny, tmp_path, float("nan"))))


def test_weights_that_are_in_no_file_are_warned_of(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny["model_name"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert model_at(tiny).facts.warnings == ()
    (warning,) = model_at(tiny, model_name=str(tmp_path)).facts.warnings
    assert "transformer.h.1.mlp.c_fc.weight are not in its files" in warning


def scaled(tiny, folder, factor):
    """The bundled model with its weights times `factor`."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny["model_name"])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny["model_name"]) / name, folder / name)
    return folder


def test_the_guides_model_name_is_known():
    from saeray.lm.hub import official_name

    assert official_name("gpt2-small").split("/")[-1] == "gpt2"  # what the hub calls it


def test_d_in_is_checked_or_filled_in(tiny):
    facts = model_at(tiny).facts
    assert check_d_in(LanguageModelSAERunnerConfig(**tiny), facts) == 128
    with pytest.raises(ConfigError, match=r"d_in = 768: .* is 128 wide"):
        check_d_in(LanguageModelSAERunnerConfig(**(tiny | {"d_in": 768})), facts)


def identity_sae(d_in):
    """x = relu(x) - relu(-x): a perfect SAE."""
    eye, zeros = torch.eye(d_in), torch.zeros(d_in)
    return StandardSAE(torch.cat([eye, -eye], 1), torch.cat([eye, -eye]), zeros.repeat(2), zeros)


def test_evaluation_of_a_perfect_and_of_an_empty_sae(tiny, tokens):
    model = model_at(tiny)
    evaluator = Evaluator(model, tokens)
    perfect = evaluator.evaluate(identity_sae(128), HOOK)
    assert perfect["metrics/CE_loss_score"] == pytest.approx(1.0, abs=1e-4)
    assert perfect["metrics/explained_variance"] == pytest.approx(1.0, abs=1e-5)
    assert perfect["metrics/kl_div_with_sae"] == pytest.approx(0.0, abs=1e-4)
    assert perfect["metrics/l0"] == pytest.approx(128, abs=1)
    for name in ("l2_ratio", "cosine", "relative_reconstruction_bias"):
        assert perfect[f"metrics/{name}"] == pytest.approx(1.0, abs=1e-5)
    for name in ("kl_div_score", "kl_div_score_mean_ablation", "CE_loss_score_mean_ablation"):
        assert perfect[f"metrics/{name}"] == pytest.approx(1.0, abs=1e-4)
    # One that gives zeros is the zero ablation itself.
    empty = initial_sae(128, 64, seed=0, b_dec=torch.zeros(128), dtype=torch.float32)
    empty.b_enc.fill_(-1e6)
    nothing = evaluator.evaluate(empty, HOOK)
    assert nothing["metrics/CE_loss_score"] == pytest.approx(0.0, abs=1e-6)
    assert nothing["metrics/kl_div_score"] == pytest.approx(0.0, abs=1e-6)
    assert nothing["metrics/l0"] == nothing["metrics/l1"] == 0
    assert nothing["eval/features_never_fired"] == 64
    assert nothing["metrics/ce_loss_with_sae"] == pytest.approx(
        nothing["metrics/ce_loss_with_ablation"]
    )


def test_clean_loss_is_the_models_own(tiny, tokens):
    model = model_at(tiny)
    clean = Evaluator(model, tokens).clean()
    with torch.no_grad():
        theirs = float(model.model(input_ids=tokens, labels=tokens).loss)
    assert clean == pytest.approx(theirs, rel=1e-5)


def test_token_ids_of_another_tokenizer_are_warned_of(tiny):
    config = LanguageModelSAERunnerConfig(**(tiny | dict(data_seed=0, eval_windows=8)))
    held_out = torch.from_numpy(TokenWindows(config, load_tokenizer(config)).evaluation())
    model = model_at(tiny)
    assert Evaluator(model, held_out).warnings() == []
    others = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[held_out.long()]
    (warning,) = Evaluator(model, others).warnings()
    assert "hardly better than chance" in warning
    assert "chance is 8.32" in warning  # ln 4096


def test_token_ids_beyond_the_embedding_are_named(tiny, tokens):
    tokens = tokens.clone()
    tokens[1, 3] = 4100
    with pytest.raises(ConfigError, match=r"embeddings for 4096 tokens, .* one of id 4100"):
        model_at(tiny).activations(tokens)


def test_the_ce_score_is_not_its_reciprocal():
    # ablated 8, with SAE 4, clean 3: (8 - 4) / (8 - 3) = 0.8
    assert ce_loss_score(clean=3.0, with_sae=4.0, ablated=8.0) == pytest.approx(0.8)


def test_the_bundled_model_is_well_under_the_unigram_entropy():
    import json

    import saeray.models

    folder = Path(saeray.models.__file__).parent / "tiny-python"
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["unigram_entropy_nats"] - figures["held_out_loss_nats"] >= 1.5
    config = LanguageModelSAERunnerConfig(
        model_name=str(folder),
        hook_point=HOOK,
        dataset_path=str(folder / "text" / "held_out.parquet"),
        eval_windows=64,
        context_size=256,
        data_seed=0,
    )
    windows = TokenWindows(config, load_tokenizer(config))
    loss = Evaluator(LanguageModel(config, [HOOK]), torch.from_numpy(windows.evaluation())).clean()
    # The recorded figure, measured again on part of the same text.
    assert math.isclose(loss, figures["held_out_loss_nats"], abs_tol=0.4)
