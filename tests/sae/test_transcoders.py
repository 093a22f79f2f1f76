"""Transcoders: every architecture with y for its target, against its formula in float64."""

import pytest
import torch
from support.formulas import (
    VARIANTS,
    D,
    L,
    batch,
    check_against_formula,
    reference_loss,
    stepped,
    target,
    trained_latents,
    trainer,
)
from support.training import gone_on_from

from saeray.sae.architectures import published_sae
from saeray.sae.losses import ghost_loss
from saeray.sae.pack_step import PackStep

WIDTHS = [D, 9, 17]  # of y


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_the_formula(variant, sparse, skip):
    for output, decoder_norm in zip(WIDTHS, ["free", "unit", "free"], strict=True):
        t = trainer(variant, output=output, skip=skip, decoder_norm=decoder_norm)
        x = batch()
        check_against_formula(t, x, sparse, target(x, output))


def make_steps(t, first, last, threads=1, sparse=True, rows=2 * 1024 + 77):
    pack = PackStep(threads, sparse=sparse)
    for i in range(first, last):
        x = batch(i, rows=rows, dtype=t.sae.W_enc.dtype)
        pack.step([t], [(x, target(x, t.sae.d_out))])
    return t


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_and_sparse_steps_agree_and_are_repeatable(variant):
    def run(sparse, threads, dtype):
        changes = dict(decoder_norm="free", gradient_clip=1.0)
        t = trainer(variant, dtype, output=9, skip=True, **changes)
        t.active_share = 0.0 if sparse else 1.0
        return make_steps(t, 0, 4, threads, sparse)

    dense, sparse = (run(s, 1, torch.float64) for s in (False, True))
    for name, mine in sparse.sae.tensors.items():
        torch.testing.assert_close(mine, dense.sae.tensors[name], rtol=1e-6, atol=1e-8)
    one, three = (run(True, n, torch.float32) for n in (1, 3))
    assert all(torch.equal(a, three.sae.tensors[n]) for n, a in one.sae.tensors.items())
    one, three = (run(False, n, torch.float32) for n in (1, 3))
    assert all(torch.equal(a, three.sae.tensors[n]) for n, a in one.sae.tensors.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(variant):
    options = dict(total_steps=16, p_updates=4, dead_feature_window=3)

    def new():
        t = trainer(variant, torch.float32, output=9, skip=True, **options)
        t.activation_scale, t.output_scale = 1.3, 0.7
        return t

    whole = make_steps(new(), 0, 14, rows=200)
    again = make_steps(gone_on_from(make_steps(new(), 0, 7, rows=200)), 7, 14, rows=200)
    assert (again.activation_scale, again.output_scale) == (1.3, 0.7)
    assert all(torch.equal(p, again.sae.tensors[n]) for n, p in whole.sae.tensors.items())
    assert whole.rule.state() == again.rule.state()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_published_computes_what_was_trained(variant, decoder_norm, skip):
    t = trainer(variant, output=9, skip=skip, decoder_norm=decoder_norm)
    x = batch(rows=300)
    y = target(x, 9)
    PackStep().step([t], [(x, y)])
    t.activation_scale, t.output_scale = 2.0, 0.5  # trained on 2 x and y / 2
    sae = t.published
    assert sae.is_transcoder and (sae.d_in, sae.d_out, sae.d_sae) == (D, 9, L)
    assert not sae.b_dec.any()  # in b_enc, as sae_lens's transcoders have it
    cfg = {"architecture": sae.architecture, **sae.settings}
    assert cfg["architecture"].endswith("skip_transcoder" if skip else "transcoder")
    again = published_sae(cfg, {n: p.clone() for n, p in sae.sae_lens_tensors().items()})
    assert torch.equal(again(x / 2), sae(x / 2))
    w = dict(t.sae.tensors)
    f = trained_latents(x, w, t, y)
    assert int((f > 0).sum()) > 100
    wanted = f @ w["W_dec"] + w["b_dec_out"] + (x @ w["W_skip"] if skip else 0.0)
    torch.testing.assert_close(sae(x / 2) / 2, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparse", [False, True])
def test_ghost_gradients_predict_what_is_left_of_y(sparse):
    t = trainer("standard", output=9, skip=True, use_ghost_grads=True, decoder_norm="free")
    x = batch()
    y = target(x, 9)
    w = {n: p.detach().clone().requires_grad_() for n, p in t.sae.tensors.items()}
    loss, f = reference_loss(x, w, t, t.options, t.dead, y)
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    residual = y - (f @ w["W_dec"] + w["b_dec_out"] + x @ w["W_skip"])
    ghost = ghost_loss(
        residual, h[:, t.dead], w["W_dec"][t.dead], residual.detach() ** 2, "sum"
    )  # fmt: skip
    (loss + ghost).backward()
    mine, metrics = stepped(t, x, sparse, y)
    torch.testing.assert_close(metrics.ghost, ghost.detach(), rtol=1e-9, atol=0)
    for name, parameter in w.items():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(mine[name] / scale, parameter.grad / scale, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_products_come_close(variant):
    x = batch(dtype=torch.float32)
    exact, rough = (
        stepped(
            trainer(variant, torch.float32, output=9, skip=True, compute_dtype=c),
            x, True, target(x, 9),
        )
        for c in ("float32", "bfloat16")
    )  # fmt: skip
    assert float(rough[1].overall) == pytest.approx(float(exact[1].overall), rel=2e-2)
    for name in exact[0]:
        if name != "fired":
            cosine = torch.cosine_similarity(exact[0][name].flatten(), rough[0][name].flatten(), 0)
            assert float(cosine) > 0.97, name


def test_beside_other_saes_each_is_what_it_is_alone():
    """Same widths, so that buffers are shared where they can be."""

    def new():
        return [
            trainer("gated", torch.float32),
            trainer("gated", torch.float32, output=D),
            trainer("gated", torch.float32, output=D, skip=True),
            trainer("step", torch.float32, output=9, skip=True),
            trainer("step", torch.float32),
        ]

    together, alone, pack = new(), new(), PackStep(2)
    for i in range(4):
        x = batch(i, dtype=torch.float32)
        y = {D: target(x, D), 9: target(x, 9)}
        reads = [(x, y[t.sae.d_out]) if t.sae.is_transcoder else (x,) for t in together]
        pack.step(together, reads)
        for t, read in zip(alone, reads, strict=True):
            PackStep().step([t], [read])
    for a, b in zip(together, alone, strict=True):
        assert all(torch.equal(p, b.sae.tensors[n]) for n, p in a.sae.tensors.items())
