"""Rows for dead features: a token of each context, by what the SAE does badly there."""

import pytest
import torch
from support.linear_model import LinearModel

from saeray.lm import rows_for_dead as under_test
from saeray.lm.rows_for_dead import rows_for_dead, token_losses
from saeray.sae.initial import initial_sae
from saeray.sae.resampling import pick_tokens
from saeray.spec.messages import RowsFor

HOOK = "blocks.0.hook_resid_pre"
V, D, CONTEXT, N = 23, 6, 9, 40


def windows():
    return torch.randint(0, V, (N, CONTEXT), generator=torch.Generator().manual_seed(1))


def wanted(method, seed=3, step=30):
    return RowsFor("sae", HOOK, method, seed, step)


@pytest.fixture
def sae():
    return initial_sae(D, 16, seed=0, b_dec=torch.zeros(D), dtype=torch.float32)


@pytest.fixture(params=[1, 7, 100])
def contexts_at_once(request, monkeypatch):
    monkeypatch.setattr(under_test, "LOGITS_AT_ONCE", request.param * CONTEXT * V)
    return request.param


def weights_by_hand(method, model, tokens, sae):
    """[n, context], written down the long way."""
    weights = torch.zeros(tokens.shape, dtype=torch.float64)
    for i, context in enumerate(tokens):
        x = model.embed[context]
        if method == "l2":
            weights[i] = (sae(x) - x).square().sum(dim=1)
            continue
        for at in range(CONTEXT - 1):  # nothing follows the last token
            following = context[at + 1]
            clean = -(x[at] @ model.unembed).log_softmax(0)[following]
            spliced = -(sae(x[at]) @ model.unembed).log_softmax(0)[following]
            weights[i, at] = max(0.0, float(spliced - clean))
    return weights


@pytest.mark.parametrize("method", ["anthropic", "l2"])
def test_a_token_of_each_context_by_its_weight(method, sae, contexts_at_once):
    model, tokens = LinearModel(HOOK, V, D), windows()
    by_hand = weights_by_hand(method, model, tokens, sae)
    (found,) = rows_for_dead(model, tokens, 5, [(wanted(method), sae)])
    assert found.rows.shape == (N, D) and found.weights.shape == (N,)
    for i in range(N):
        at = (model.embed[tokens[i]] - found.rows[i]).abs().sum(dim=1).argmin()
        assert torch.equal(found.rows[i], model.embed[tokens[i, at]])
        same = [j for j in range(CONTEXT) if tokens[i, j] == tokens[i, at]]
        near = (by_hand[i, same] - found.weights[i]).abs().min()
        assert float(near) < 1e-5 * float(by_hand.max())


def test_what_is_picked_depends_on_seed_step_and_block_and_on_no_other_sae(sae):
    model, tokens = LinearModel(HOOK, V, D), windows()
    other = initial_sae(D, 8, seed=1, b_dec=torch.zeros(D), dtype=torch.float32)
    (alone,) = rows_for_dead(model, tokens, 5, [(wanted("anthropic"), sae)])
    both = [(wanted("l2"), other), (wanted("anthropic"), sae), (wanted("anthropic"), other)]
    together = rows_for_dead(model, tokens, 5, both)[1]
    assert torch.equal(alone.rows, together.rows) and torch.equal(alone.weights, together.weights)
    for block, changed in ((6, {}), (5, {"seed": 4}), (5, {"step": 31})):
        (found,) = rows_for_dead(model, tokens, block, [(wanted("anthropic", **changed), sae)])
        assert not torch.equal(found.rows, alone.rows)


def test_a_perfect_sae_has_no_token_to_give():
    model, tokens = LinearModel(HOOK, V, D), windows()
    perfect = initial_sae(D, 2 * D, seed=0, b_dec=torch.zeros(D), dtype=torch.float32)
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    perfect.W_enc.copy_(both.t())
    perfect.W_dec.copy_(both)
    for method in ("anthropic", "l2"):
        (found,) = rows_for_dead(model, tokens, 0, [(wanted(method), perfect)])
        assert not found.weights.any()


def test_the_loss_of_a_token_is_that_of_what_follows():
    tokens = torch.tensor([[0, 1, 2]])
    logits = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 0.0, 5.0], [9.0, 0.0, 0.0]]])
    losses = token_losses(logits, tokens)
    first = torch.tensor([0.0, 1.0, 2.0]).double().exp().sum().log() - 1
    second = torch.tensor([0.0, 0.0, 5.0]).double().exp().sum().log() - 5
    expected = torch.stack([first, second, torch.zeros(())]).unsqueeze(0)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-7)


def test_tokens_are_picked_in_proportion():
    weights = torch.tensor([[0.0, 1.0, 3.0, -2.0, float("nan")], [0.0] * 5, [0, 0, 0, 0, 2.0]])
    picks = [pick_tokens(weights, 0, i) for i in range(2000)]
    first = torch.stack([at[0] for at, _ in picks])
    assert set(first.tolist()) == {1, 2}
    assert float((first == 2).double().mean()) == pytest.approx(0.75, abs=0.045)  # 4.6 deviations
    assert all(w[1] == 0 and w[2] == 2 and at[2] == 4 for at, w in picks)
    assert all(w[0] == weights[0, at[0]] for at, w in picks)


@pytest.mark.parametrize("method", ["anthropic", "l2"])
def test_tokens_that_no_sae_sees_are_not_picked(method, sae):
    model, tokens = LinearModel(HOOK, V, D), windows()
    served = tokens % 3 != 0
    served[5] = False  # a context with none of them
    (found,) = rows_for_dead(model, tokens, 0, [(wanted(method), sae)], served)
    at = torch.cdist(found.rows, model.embed).argmin(dim=1)
    picked = found.weights > 0
    assert bool((at[picked] % 3 != 0).all())
    assert not picked[5] and int(picked.sum()) > N // 2
