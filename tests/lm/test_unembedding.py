"""Logit effects: SAEDashboard's convention, by formula and by TransformerLens's own folding."""

import pytest
import torch
from support.bundled import fields

from saeray.lm.model import LanguageModel
from saeray.lm.unembedding import final_norm, folded_unembedding, linear_part, reaches_logits
from saeray.sae.feature_directions import LOGIT_BINS, logit_effects, nearest_features
from saeray.spec.config import LanguageModelSAERunnerConfig, resolve

HOOK = "blocks.2.hook_resid_pre"


@pytest.fixture(scope="module")
def model():
    return LanguageModel(resolve(LanguageModelSAERunnerConfig(**fields())), [HOOK])


def test_the_final_norm_is_found_and_folded(model):
    hf = model.model
    norm = hf.transformer.ln_f
    assert final_norm(model, hf.lm_head) is norm
    W_U = hf.lm_head.weight.float() * norm.weight
    W_U = W_U - W_U.mean(dim=1, keepdim=True)
    W_U = W_U - W_U.mean(dim=0)
    torch.testing.assert_close(folded_unembedding(model), W_U, rtol=1e-4, atol=1e-5)


def test_effects_are_what_a_small_step_along_the_direction_adds(model):
    """Of equal length: after the norm's own division, and up to a constant over the vocabulary."""
    norm, head = model.model.transformer.ln_f, model.model.lm_head
    g = torch.Generator().manual_seed(1)
    x, d = torch.randn(128, generator=g) * 10, torch.randn(128, generator=g)
    d = d - d.mean() - (x - x.mean()) * ((x - x.mean()) @ d) / (x - x.mean()).square().sum()
    with torch.no_grad():
        added = (head(norm(x + 1e-2 * d)) - head(norm(x))) / 1e-2 * (x - x.mean()).std(correction=0)
        ours = folded_unembedding(model) @ d
    torch.testing.assert_close(ours, added - added.mean(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("norm", "centres"),
    [(torch.nn.LayerNorm(8), True), (torch.nn.RMSNorm(8, eps=1e-6), False)],
)
def test_scale_and_centring_are_read_off_any_norm(norm, centres):
    norm.weight.data = torch.arange(1.0, 9.0)
    scale, found = linear_part(norm, 8)
    torch.testing.assert_close(scale, norm.weight.data, rtol=1e-4, atol=1e-4)
    assert found is centres


@pytest.mark.parametrize(
    ("hook", "does"),
    [
        (HOOK, True),
        ("blocks.0.hook_mlp_out", True),
        ("blocks.0.attn.hook_z", False),
        ("blocks.0.mlp.hook_post", False),
    ],
)
def test_which_hook_points_are_of_the_residual_stream(hook, does):
    assert reaches_logits(hook) is does


def test_effects_against_all_logits_at_once(monkeypatch):
    g = torch.Generator().manual_seed(0)
    W_dec, U = torch.randn(13, 6, generator=g), torch.randn(40, 6, generator=g)
    monkeypatch.setattr("saeray.sae.feature_directions.AT_ONCE", 100)  # two rows at a time
    found = logit_effects(W_dec, U, n=4)
    logits = W_dec @ U.t()
    order = logits.sort(dim=1, descending=True)
    torch.testing.assert_close(found.top_logit, order.values[:, :4])
    assert torch.equal(found.top_token, order.indices[:, :4])
    torch.testing.assert_close(found.bottom_logit, order.values.flip(1)[:, :4])
    assert found.histogram.shape == (13, LOGIT_BINS)
    assert found.histogram.sum(dim=1).tolist() == [40] * 13
    for row, counts in zip(logits, found.histogram, strict=True):
        expected = torch.histc(row, LOGIT_BINS, float(row.min()), float(row.max()))
        assert (counts - expected.long()).abs().sum() <= 4  # values at an edge


def test_neighbours_against_all_cosines_at_once(monkeypatch):
    W_dec = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("saeray.sae.feature_directions.AT_ONCE", 30)
    found = nearest_features(W_dec, 3)
    cosines = torch.nn.functional.cosine_similarity(W_dec.unsqueeze(1), W_dec.unsqueeze(0), dim=2)
    cosines.fill_diagonal_(-2)
    order = cosines.topk(3, dim=1)
    torch.testing.assert_close(found.cosine, order.values)
    assert torch.equal(found.feature, order.indices)
    few = nearest_features(W_dec[:2], 3)
    assert few.feature.tolist() == [[1, -1, -1], [0, -1, -1]]
    assert nearest_features(W_dec[:1], 2).feature.tolist() == [[-1, -1]]
