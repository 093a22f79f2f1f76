"""Evaluation is sums over parts of the held-out windows, and says where a figure has no meaning."""

import gc
from types import SimpleNamespace

import pytest
import torch

from saeray.lm import evaluate
from saeray.lm.evaluate import Evaluator, ce_loss_score
from saeray.sae.initial import initial_sae
from saeray.sae.metrics import DescriptionLength, FeatureSums
from saeray.spec.messages import FINAL_METRICS
from saeray.spec.metric_names import of_batch

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
        self.n_calls, self.n_partly, self.measure_at, self.measured = 0, 0, 0, 0

    def activations(self, tokens):
        self.n_partly += 1
        return {HOOK: self.embed[tokens.long()].reshape(-1, D)}

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

    def log_probabilities(x):
        return (x.reshape(50, CONTEXT, D).float() @ model.unembed).double().log_softmax(-1)

    def ce(log_p):
        return float(-log_p[:, :-1].gather(2, tokens[:, 1:, None]).mean())

    def kl(log_p):
        return float((plain.exp() * (plain - log_p)).sum(-1).mean())

    plain, with_sae = log_probabilities(x), log_probabilities(x_hat)
    zeros, mean = log_probabilities(0 * x), log_probabilities(x.mean(0).expand_as(x))
    inner, norm = (x * x_hat).sum(1), x_hat.double().norm(dim=1)
    wanted = {
        "explained_variance": 1 - error.square().sum() / variance.sum(),
        "explained_variance_per_token": explained.mean(),
        "explained_variance_per_token_std": explained.std(),
        "fvu": error.square().sum() / variance.sum(),
        "cosine": (inner / norm / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": norm.square().sum() / inner.sum(),
        "l2_norm": norm.mean(),
        "l2_ratio": (norm / x.norm(dim=1)).mean(),
        "l0": (sae.encode(x.float()) > 0).double().sum(1).mean(),
        "l1": sae.encode(x.float()).double().sum(1).mean(),
        "ce_loss_without_sae": ce(plain),
        "ce_loss_with_sae": ce(with_sae),
        "ce_loss_with_ablation": ce(zeros),
        "ce_loss_with_mean_ablation": ce(mean),
        "CE_loss_score": (ce(zeros) - ce(with_sae)) / (ce(zeros) - ce(plain)),
        "CE_loss_score_mean_ablation": (ce(mean) - ce(with_sae)) / (ce(mean) - ce(plain)),
        "kl_div_with_sae": kl(with_sae),
        "kl_div_with_ablation": kl(zeros),
        "kl_div_with_mean_ablation": kl(mean),
        "kl_div_score": 1 - kl(with_sae) / kl(zeros),
        "kl_div_score_mean_ablation": 1 - kl(with_sae) / kl(mean),
    }
    for name, value in wanted.items():
        assert got[f"metrics/{name}"] == pytest.approx(float(value), rel=1e-5, abs=1e-5), name
    assert got["eval/n_tokens"] == 50 * CONTEXT
    assert got["warnings"] == []


def test_memory_does_not_grow_with_the_windows(monkeypatch):
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", CONTEXT * V)  # one window at a time
    held = []
    for n in (4, 64):
        model, tokens, sae = TwoMatrices(), windows(n), some_sae()
        evaluator = Evaluator(model, tokens)
        before = bytes_of_tensors()
        model.measure_at = 5 * n  # the last forward that an SAE is spliced into
        evaluator.evaluate(sae, HOOK)
        assert model.n_calls == 5 * n
        held.append(model.measured - before)
    assert held[0] == held[1] < 4 * CONTEXT * V * 4  # bytes: a window's logits, and what is small


def test_the_last_evaluation_holds_a_bounded_sample_of_the_rows(monkeypatch):
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", CONTEXT * V)
    monkeypatch.setattr(evaluate, "PROJECTED_ROWS", 64)
    taken = []
    monkeypatch.setattr(
        evaluate, "nth_decoder_projection", lambda x, *_: taken.append(x) or float(len(x))
    )
    for n in (4, 64):
        model = TwoMatrices()
        Evaluator(model, windows(n)).evaluate(some_sae(), HOOK, final=True)
        every = n * CONTEXT // 64 + (n * CONTEXT % 64 > 0)
        rows = model.embed[windows(n).flatten()][::every]  # spread over all windows
        assert torch.equal(taken[-1], rows)
        assert len(rows) <= 64


def test_saes_evaluated_together_share_the_models_own_forward_and_nothing_else():
    model, tokens = TwoMatrices(), windows(6)
    saes = [initial_sae(D, n, seed=n, b_dec=torch.zeros(D), dtype=torch.float32) for n in (8, 40)]
    evaluator = Evaluator(model, tokens)
    alone = [evaluator.evaluate(sae, HOOK, final=True) for sae in saes]
    model.n_calls = model.n_partly = 0
    together = evaluator.evaluate_all(saes, (HOOK,), final=True)
    assert (model.n_calls, model.n_partly) == (1 + len(saes), 1)
    for one, other in zip(alone, together, strict=True):
        features, others = one.pop("features"), other.pop("features")
        assert one == other
        assert list(features) == list(others)
        for name, values in features.items():
            torch.testing.assert_close(others[name], values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("latents", [1 << 22, 7 * 40])
def test_the_last_evaluation_also_has_what_takes_a_second_pass(monkeypatch, latents):
    monkeypatch.setattr(evaluate, "LATENTS_AT_ONCE", latents)
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", 3 * CONTEXT * V)
    model, tokens, sae = TwoMatrices(), windows(10), some_sae()
    sae.b_enc[3] = -100.0
    evaluator = Evaluator(model, tokens)
    plain, found = evaluator.evaluate(sae, HOOK), evaluator.evaluate(sae, HOOK, final=True)
    finals = {of_batch(name) for name in FINAL_METRICS}  # until they are kept
    assert found.keys() - plain.keys() == {*finals, "features"}
    x = model.embed[tokens.flatten()]
    f = sae.encode(x)
    projected = (x - sae.b_dec) @ (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)).t()
    ordered = projected.flatten().sort(descending=True).values
    n = 40 // 4
    assert found["metrics/s_n_dec"] == pytest.approx(float(ordered[n * len(x)]), rel=1e-5)
    sums = FeatureSums(40, x.device)
    sums.add(f)
    length = DescriptionLength(sums)
    length.add(f)
    assert found["metrics/mdl"] == pytest.approx(length.bits(), rel=1e-6)
    table = found["features"]
    assert all(len(column) == 40 for column in table.values())
    assert torch.equal(table["density"], (f > 0).double().mean(0))
    torch.testing.assert_close(table["max_activation"], f.amax(0))
    mean = f.double().sum(0) / (f > 0).sum(0)
    torch.testing.assert_close(
        table["mean_activation_when_active"].double(), mean, rtol=1e-5, atol=0, equal_nan=True
    )
    assert bool(table["dead_on_held_out"][3])
    assert int(table["dead_on_held_out"].sum()) == found["eval/features_never_fired"]


def test_a_hook_that_does_not_reach_the_logits_has_no_score_and_says_so():
    found = Evaluator(TwoMatrices(reaches_the_logits=False), windows(6)).evaluate(some_sae(), HOOK)
    for ablation in ("", "_mean_ablation"):
        assert found[f"metrics/CE_loss_score{ablation}"] is None
        assert found[f"metrics/kl_div_score{ablation}"] is None
    assert found["metrics/ce_loss_with_ablation"] == found["metrics/ce_loss_without_sae"]
    assert found["metrics/explained_variance"] < 1  # this has a meaning all the same
    (warning,) = found["warnings"]
    assert warning.startswith(f"{HOOK}: the model's loss is the same with zeros in its place")
    assert ce_loss_score(clean=3.0, with_sae=3.1, ablated=3.0 + 1e-9) is None


def test_activations_that_are_all_equal_have_no_variance_to_explain():
    model = TwoMatrices()
    model.embed[:] = 0.5
    found = Evaluator(model, windows(6)).evaluate(some_sae(), HOOK)
    assert found["metrics/explained_variance"] is found["metrics/fvu"] is None
    assert any("no variance to explain" in w for w in found["warnings"])


class ThreeMatrices(TwoMatrices):
    """The same with a hidden layer between: what a transcoder can stand for."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.randn(D, D, generator=torch.Generator().manual_seed(4)) / 4

    def made_of(self, x):
        return torch.relu(x @ self.hidden) - 0.1

    def activations(self, tokens):
        x = self.embed[tokens.long()]
        return {h: v.reshape(-1, D) for h, v in ((HOOK, x), (OUT, self.made_of(x)))}

    def logits(self, tokens, splice=None):
        """Both hooks can be spliced; what is made of x goes beside it."""
        splice = {HOOK: lambda x: x, OUT: lambda y: y} | dict(splice or {})
        x = splice[HOOK](self.embed[tokens.long()])
        return (x + splice[OUT](self.made_of(x))) @ self.unembed


OUT = "blocks.0.hook_mlp_out"


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("windows_at_once", [1, 50])
def test_a_transcoder_stands_in_for_what_it_is_to_make(monkeypatch, windows_at_once, skip):
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", windows_at_once * CONTEXT * V)
    model, tokens = ThreeMatrices(), windows(20)
    sae = initial_sae(
        D, 40, seed=0, b_dec=torch.full((D,), 0.2), dtype=torch.float32,
        b_dec_out=torch.linspace(0, 0.2, D), skip=skip,
    )  # fmt: skip
    if skip:
        sae.W_skip.copy_(torch.eye(D) / 2)
    got = Evaluator(model, tokens).evaluate(sae, HOOK, OUT, final=True)
    x = model.embed[tokens]
    y, y_hat = model.made_of(x), sae(x)
    assert torch.equal(y_hat, sae.decode(sae.encode(x)) + (x / 2 if skip else 0.0))

    def ce(y):
        log_p = ((x + y) @ model.unembed).double().log_softmax(-1)
        return float(-log_p[:, :-1].gather(2, tokens[:, 1:, None]).mean())

    rows, error = y.reshape(-1, D).double(), (y_hat - y).reshape(-1, D).double()
    variance = (rows - rows.mean(0)).square().sum()
    projected = rows - sae.b_dec_out - (x.reshape(-1, D).double() / 2 if skip else 0.0)
    units = sae.W_dec.double() / sae.W_dec.double().norm(dim=1, keepdim=True)
    projections = (projected @ units.t()).flatten().sort(descending=True).values
    wanted = {
        "fvu": error.square().sum() / variance,
        "l0": (sae.encode(x) > 0).double().sum(-1).mean(),
        "ce_loss_with_sae": ce(y_hat),
        "ce_loss_with_ablation": ce(0 * y),
        "ce_loss_with_mean_ablation": ce(y.mean((0, 1)).expand_as(y)),
        "CE_loss_score": (ce(0 * y) - ce(y_hat)) / (ce(0 * y) - ce(y)),
        "s_n_dec": projections[10 * len(rows)],
    }
    for name, value in wanted.items():
        assert got[f"metrics/{name}"] == pytest.approx(float(value), rel=1e-5, abs=1e-5), name


def test_rows_that_no_sae_sees_are_in_no_figure_and_not_replaced():
    model, tokens, sae = TwoMatrices(offset=2.0), windows(30), some_sae()
    served = (tokens > 3) & (torch.arange(CONTEXT) >= 5)
    served[4] = False  # a window of which nothing is left
    got = Evaluator(model, tokens, served).evaluate(sae, HOOK, final=True)
    x = model.embed[tokens]
    x_hat = torch.where(served[..., None], sae(x), x)

    def log_p(x):
        return (x @ model.unembed).double().log_softmax(-1)

    def ce(x):  # of a row that is served and followed by a token, as in sae_lens's run_evals
        of_next = log_p(x)[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
        return float(-of_next[served[:, :-1]].mean())

    def kl(other):
        each = (log_p(x).exp() * (log_p(x) - log_p(other))).sum(-1)
        return float(each[served].mean())

    zeros = torch.zeros_like(x)  # of all rows, as there
    kept, error = x[served].double(), (x_hat - x)[served].double()
    mean = x[served].mean(0).expand_as(x)
    f = sae.encode(x[served])
    wanted = {
        "metrics/fvu": error.square().sum() / (kept - kept.mean(0)).square().sum(),
        "metrics/l0": (f > 0).double().sum(1).mean(),
        "metrics/ce_loss_without_sae": ce(x),
        "metrics/ce_loss_with_sae": ce(x_hat),
        "metrics/ce_loss_with_ablation": ce(zeros),
        "metrics/ce_loss_with_mean_ablation": ce(mean),
        "metrics/CE_loss_score": (ce(zeros) - ce(x_hat)) / (ce(zeros) - ce(x)),
        "metrics/kl_div_with_sae": kl(x_hat),
        "metrics/kl_div_with_ablation": kl(zeros),
        "eval/n_tokens": int(served.sum()),
    }
    for name, value in wanted.items():
        assert got[name] == pytest.approx(float(value), rel=1e-5, abs=1e-5), name
    density = got["features"]["density"].double()
    assert torch.allclose(density, (f > 0).double().mean(0), atol=1e-6)
    # Rows that are not served change no figure of the others in this model, which mixes no rows.
    others = torch.where(served | served.roll(1, 1), tokens, (tokens + 1) % 4)
    again = Evaluator(model, others, served).evaluate(sae, HOOK, final=True)
    assert all(again[name] == got[name] for name in wanted)


def test_a_transcoder_stands_in_for_the_rows_that_are_served_alone():
    model, tokens = ThreeMatrices(), windows(20)
    served = tokens > 5
    sae = initial_sae(
        D, 40, seed=0, b_dec=torch.zeros(D), dtype=torch.float32,
        b_dec_out=torch.linspace(0, 0.2, D), skip=True,
    )  # fmt: skip
    got = Evaluator(model, tokens, served).evaluate(sae, HOOK, OUT, final=True)
    x = model.embed[tokens]
    y = model.made_of(x)
    y_hat = torch.where(served[..., None], sae(x), y)
    log_p = ((x + y_hat) @ model.unembed).double().log_softmax(-1)
    of_next = log_p[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    assert got["metrics/ce_loss_with_sae"] == pytest.approx(
        float(-of_next[served[:, :-1]].mean()), rel=1e-5
    )
    error, rows = (y_hat - y)[served].double(), y[served].double()
    fvu = error.square().sum() / (rows - rows.mean(0)).square().sum()
    assert got["metrics/fvu"] == pytest.approx(float(fvu), rel=1e-5)
