"""Every architecture's step against its formula, differentiated by autograd in float64."""

import pytest
import torch
from support.formulas import (
    ROWS,
    VARIANTS,
    L,
    batch,
    check_against_formula,
    stepped,
    trained_latents,
    trainer,
)
from support.training import gone_on_from

from saeray.sae.architectures import published_sae
from saeray.sae.pack_step import PackStep


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_the_formula(variant, decoder_norm, sparse):
    check_against_formula(trainer(variant, decoder_norm=decoder_norm), batch(), sparse)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_and_sparse_steps_agree_and_are_repeatable(variant):
    def run(sparse, threads, dtype):
        t = trainer(variant, dtype=dtype, decoder_norm="free", gradient_clip=1.0)
        t.active_share = 0.0 if sparse else 1.0
        pack = PackStep(threads, sparse=sparse)
        for i in range(4):
            pack.step([t], batch(i, dtype=dtype))
        return t

    dense, sparse = (run(s, 1, torch.float64) for s in (False, True))
    for name, mine in sparse.sae.tensors.items():
        torch.testing.assert_close(mine, dense.sae.tensors[name], rtol=1e-6, atol=1e-8)
    one, three = (run(True, n, torch.float32) for n in (1, 3))
    assert all(torch.equal(a, three.sae.tensors[n]) for n, a in one.sae.tensors.items())
    assert one.rule.state() == three.rule.state()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(variant):
    steps = dict(total_steps=16, p_updates=4, dead_feature_window=3)

    def advanced(t, first, last):
        pack = PackStep()
        for i in range(first, last):
            pack.step([t], batch(i, rows=200, dtype=torch.float32))
        return t

    whole = advanced(trainer(variant, dtype=torch.float32, **steps), 0, 14)
    half = advanced(trainer(variant, dtype=torch.float32, **steps), 0, 7)
    again = gone_on_from(half)
    advanced(again, 7, 14)
    assert all(torch.equal(p, again.sae.tensors[n]) for n, p in whole.sae.tensors.items())
    assert whole.rule.state() == again.rule.state()
    assert whole.coefficient == again.coefficient


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_published_computes_what_was_trained(variant, decoder_norm):
    t = trainer(variant, decoder_norm=decoder_norm)
    x = batch(rows=300)
    PackStep().step([t], x)
    t.activation_scale = 2.0  # trained on 2 x
    sae = t.published
    cfg = {"architecture": sae.architecture, **sae.settings}
    again = published_sae(cfg, {n: p.clone() for n, p in sae.sae_lens_tensors().items()})
    assert torch.equal(again(x / 2), sae(x / 2))
    w = dict(t.sae.tensors)
    f = trained_latents(x, w, t)
    assert int((f > 0).sum()) > 100
    torch.testing.assert_close(2 * sae(x / 2), f @ w["W_dec"] + w["b_dec"], rtol=1e-9, atol=1e-9)


def test_p_falls_and_the_penalty_goes_on_at_its_strength():
    t = trainer("p_anneal", lr=1e-5, p_updates=2, p_anneal_start_step=10, p_end=0.4)
    assert t.rule.updates == [10, 25]
    seen = []
    for i in range(30):
        c = t.coefficient
        (metrics,) = PackStep().step([t], batch(i), want_metrics=True)
        seen.append((t.rule.p, c * float(metrics.l1)))
    assert [p for p, _ in seen[:9]] == [1.0] * 9
    assert seen[9][0] == pytest.approx(0.7) and seen[29][0] == pytest.approx(0.4)
    before, after = (penalty for _, penalty in seen[9:11])  # the batches are much alike
    assert after == pytest.approx(before, rel=0.05)
    assert abs(t.rule.multiplier - 1) > 0.2


def test_theta_of_batchtopk_is_the_running_mean_of_the_smallest():
    t = trainer("batchtopk", k=2, topk_threshold_rate=0.8)
    wanted = None
    for i in range(13):
        x = batch(i)
        h = torch.relu((x - t.sae.b_dec) @ t.sae.W_enc + t.sae.b_enc)
        smallest = float(h.flatten().topk(2 * ROWS).values[-1])
        rate = min(1.0, max(0.8, 10 / (i + 1)))  # the tenth batch is the last that counts alone
        wanted = smallest if wanted is None else (1 - rate) * wanted + rate * smallest
        PackStep().step([t], x)
    assert t.rule.threshold == pytest.approx(wanted, rel=1e-12)
    assert t.published.threshold.tolist() == [t.rule.threshold] * L


def test_what_is_equal_to_the_smallest_is_active_too():
    """Rows that are the same (a BOS's) tie, and no order may decide between them."""
    t = trainer("batchtopk", k=1)
    t.sae.b_enc.fill_(-0.5)
    x = batch(rows=4)[:1].repeat(6, 1)
    _, metrics = stepped(t, x, True)
    h = (x[0] - t.sae.b_dec) @ t.sae.W_enc + t.sae.b_enc
    assert float(metrics.l0) == 1.0  # each row's largest, six times
    assert t.rule.smallest == pytest.approx(float(h.max()))


def test_a_bound_that_was_too_high_is_lowered():
    t = trainer("batchtopk", k=3)
    t.rule.smallest = 1e6
    _, metrics = stepped(t, batch(), True)
    assert float(metrics.l0) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("variant", ["topk", "batchtopk", "matryoshka", "step", "gated"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_that_is_no_number_is_seen(variant, dtype):
    t = trainer(variant, dtype=torch.float32, compute_dtype=dtype)
    t.sae.W_enc[:, 100] = float("nan")
    _, metrics = stepped(t, batch(dtype=torch.float32), True)
    assert not torch.isfinite(metrics.overall)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_products_come_close(variant):
    exact, rough = (trainer(variant, dtype=torch.float32, compute_dtype=c)
                    for c in ("float32", "bfloat16"))  # fmt: skip
    a, b = (stepped(t, batch(dtype=torch.float32), True) for t in (exact, rough))
    assert float(b[1].overall) == pytest.approx(float(a[1].overall), rel=2e-2)
    for name in exact.sae.tensors:
        cosine = torch.cosine_similarity(a[0][name].flatten(), b[0][name].flatten(), dim=0)
        assert float(cosine) > 0.97, name
