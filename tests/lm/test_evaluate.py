"""Evaluation is sums over parts of the held-out windows, and says where a figure has no meaning."""

import gc
from types import SimpleNamespace

import pytest
import torch

from saeray.lm import evaluate
from saeray.lm.evaluate import Evaluator, ce_loss_score
from saeray.sae.initial import initial_sae

HOOK = "blocks.0.hook_resid_pre"
V, D, CONTEXT = 32, 16, 24


class TwoMatrices:
    """A model whose logits are its activations times a matrix; it is `LanguageModel` to others."""

    facts = SimpleNamespace(d_vocab=V)
    device = torch.device("cpu")

    def __init__(self, reaches_the_logits=True, offset=0.0):
        generator = torch.Generator().manual_seed(0)
        self.embed = offset + torch.randn(V, D, generator=generator)
        self.unembed = torch.randn(D, V, generator=generator) / 4
        self.reaches_the_logits = reaches_the_logits
        self.n_calls, self.measure_at, self.measured = 0, 0, 0

    def logits(self, tokens, splice=None):
        x = self.embed[tokens.long()]
        self.n_calls += 1
        if self.n_calls == self.measure_at:
            self.measured = bytes_of_tensors()
        spliced = splice[HOOK](x) if splice else x
        return (spliced if self.reaches_the_logits else x) @ self.unembed


@pytest.fixture(autouse=True)
def knows_nothing(monkeypatch):
    """Its matrices are random, which is not the matter here."""
    monkeypatch.setattr(evaluate, "CHANCE_SHARE", 100.0)


def bytes_of_tensors():
    """Held by all tensors of this process, shared storage counted once."""
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if isinstance(t, torch.Tensor)
    }
    return sum(held.values())


def windows(n):
    return torch.randint(0, V, (n, CONTEXT), generator=torch.Generator().manual_seed(1))


def some_sae():
    return initial_sae(D, 40, seed=0, b_dec=torch.zeros(D), dtype=torch.float32)


@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("windows_at_once", [1, 3, 50])
def test_figures_are_those_of_all_rows_at_once(monkeypatch, windows_at_once, offset):
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", windows_at_once * CONTEXT * V)
    model, tokens, sae = TwoMatrices(offset=offset), windows(50), some_sae()
    got = Evaluator(model, tokens).evaluate(sae, HOOK)
    x = model.embed[tokens].reshape(-1, D)
    x_hat = sae(x)
    error, x = (x_hat - x).double(), x.double()
    variance = (x - x.mean(0)).square().sum(1)
    explained = 1 - error.square().sum(1) / variance
    log_p = (x_hat.reshape(50, CONTEXT, D) @ model.unembed)[:, :-1].double().log_softmax(-1)
    plain = (model.embed[tokens] @ model.unembed)[:, :-1].double().log_softmax(-1)
    wanted = {
        "explained_variance": 1 - error.square().sum() / variance.sum(),
        "explained_variance_per_token": explained.mean(),
        "explained_variance_per_token_std": explained.std(),
        "l2_norm": x_hat.double().norm(dim=1).mean(),
        "l2_ratio": (x_hat.double().norm(dim=1) / x.norm(dim=1)).mean(),
        "l0": (sae.encode(x.float()) > 0).double().sum(1).mean(),
        "ce_loss_with_sae": -log_p.gather(2, tokens[:, 1:, None]).mean(),
        "kl_div_with_sae": (plain.exp() * (plain - log_p)).sum(-1).mean(),
    }
    for name, value in wanted.items():
        assert got[f"metrics/{name}"] == pytest.approx(float(value), rel=1e-6, abs=1e-6), name
    assert got["eval/n_tokens"] == 50 * CONTEXT
    assert got["warnings"] == []


def test_memory_does_not_grow_with_the_windows(monkeypatch):
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 1)  # one window at a time
    held = []
    for n in (4, 64):
        model, tokens, sae = TwoMatrices(), windows(n), some_sae()
        evaluator = Evaluator(model, tokens)
        before = bytes_of_tensors()
        model.measure_at = 4 * n - 1  # the last forward that an SAE is spliced into
        evaluator.evaluate(sae, HOOK)
        assert model.n_calls == 4 * n
        held.append(model.measured - before)
    assert held[0] == held[1] < 3 * CONTEXT * V * 4  # bytes: not even a window's activations


def test_a_hook_that_does_not_reach_the_logits_has_no_score_and_says_so():
    found = Evaluator(TwoMatrices(reaches_the_logits=False), windows(6)).evaluate(some_sae(), HOOK)
    assert found["metrics/CE_loss_score"] is None
    assert found["metrics/ce_loss_with_ablation"] == found["metrics/ce_loss_without_sae"]
    assert found["metrics/explained_variance"] < 1  # this has a meaning all the same
    (warning,) = found["warnings"]
    assert warning.startswith(f"{HOOK}: the model's loss is the same with zeros in its place")
    assert ce_loss_score(clean=3.0, with_sae=3.1, ablated=3.0 + 1e-9) is None


def test_activations_that_are_all_equal_have_no_variance_to_explain():
    model = TwoMatrices()
    model.embed[:] = 0.5
    found = Evaluator(model, windows(6)).evaluate(some_sae(), HOOK)
    assert found["metrics/explained_variance"] is None
    assert any("no variance to explain" in w for w in found["warnings"])
