"""Every architecture's step against its formula, differentiated by autograd in float64."""

import pytest
import torch
from support.training import gone_on_from

from saeray.sae.architectures import ARCHITECTURES, published_sae
from saeray.sae.architectures.base import PARAMETERS
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer

D, L = 13, 203
ROWS = 2 * 1024 + 77  # two lanes and a part of one
WIDTHS = (11, 64, L)

# What each is trained with; L0 is then far below L, and each remedy has something to do.
JUMPRELU = dict(architecture="jumprelu", l0_coefficient=0.02, jumprelu_init_threshold=0.1)
VARIANTS = {
    "standard": dict(architecture="standard", l1_coefficient=3e-2),
    "p_anneal": dict(architecture="p_anneal", l1_coefficient=3e-2, p_end=0.3),
    "gated": dict(architecture="gated", l1_coefficient=3e-2),
    "steered": dict(architecture="gated", l1_coefficient=3e-2, target_l0=4.0),
    "gated, constant decoder": dict(
        architecture="gated", l1_coefficient=3e-2, gated_aux_decoder="constant"
    ),
    "topk": dict(architecture="topk", k=9),
    "batchtopk": dict(architecture="batchtopk", k=9.5),
    "matryoshka": dict(architecture="matryoshka", k=9, matryoshka_widths=WIDTHS),
    "auxk as in sae_lens": dict(
        architecture="topk", k=9, auxk_scaling="dead_share", auxk_coefficient=1.0
    ),
    "step": JUMPRELU,
    "step to input": JUMPRELU | dict(jumprelu_ste_to_input=True),
    "tanh": JUMPRELU
    | dict(jumprelu_sparsity_loss_mode="tanh", pre_act_loss_coefficient=3e-3),
    "quadratic": JUMPRELU
    | dict(
        jumprelu_sparsity_loss_mode="quadratic", target_l0=20.0, jumprelu_ste_to_input=True,
        pre_act_loss_coefficient=3e-3,
    ),
}  # fmt: skip


def trainer(variant, dtype=torch.float64, **changes):
    values = dict(lr=1e-2, total_steps=40, lr_scheduler_name="constant", mse_normalization="sum")
    options = TrainingOptions(**(values | VARIANTS[variant] | changes))
    free = options.decoder_norm == "free"
    sae = initial_sae(
        D, L, seed=3, b_dec=torch.linspace(-0.2, 0.3, D), dtype=dtype,
        encoder_init_scale=0.5, architecture=ARCHITECTURES[options.architecture], options=options,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    sae.b_enc.fill_(-0.5)
    sae.b_enc[5] = 20.0  # fires in every row
    sae.b_enc[7:40] = -1.5  # seldom do, and are taken for dead
    if free:
        sae.W_dec.mul_(torch.rand(L, 1, generator=generator) + 0.5)
    for name in sae.EXTRA:
        parameter = getattr(sae, name)
        parameter.add_(0.2 * torch.rand(L, generator=generator).to(dtype))
    t = SAETrainer(sae, options)
    t.steps_since_fired[7:40] = options.dead_feature_window + 1
    return t


def batch(seed=0, rows=ROWS, dtype=torch.float64):
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[3] = -0.02  # a row in which nearly nothing fires
    return x


class JumpReLU(torch.autograd.Function):
    """f = h 1[h > θ], and its pseudo-derivatives as the papers have them."""

    @staticmethod
    def forward(ctx, h, theta, bandwidth, to_input):
        ctx.save_for_backward(h, theta)
        ctx.settings = bandwidth, to_input
        return h * (h > theta)

    @staticmethod
    def backward(ctx, g):
        (h, theta), (bandwidth, to_input) = ctx.saved_tensors, ctx.settings
        rect = ((h - theta) / bandwidth).abs() < 0.5
        ste = theta / bandwidth * rect * g
        return g * (h > theta) + (ste if to_input else 0.0), -ste.sum(0), None, None


class Step(torch.autograd.Function):
    """1[h > θ]."""

    @staticmethod
    def forward(ctx, h, theta, bandwidth, to_input):
        ctx.save_for_backward(h, theta)
        ctx.settings = bandwidth, to_input
        return (h > theta).to(h.dtype)

    @staticmethod
    def backward(ctx, g):
        (h, theta), (bandwidth, to_input) = ctx.saved_tensors, ctx.settings
        ste = (((h - theta) / bandwidth).abs() < 0.5) / bandwidth * g
        return ste if to_input else None, -ste.sum(0), None, None


def power(f, p):
    return torch.where(f > 1e-3, f.clamp_min(1e-9) ** p, f * 1e-3 ** (p - 1))


def reference_loss(x, w, t, o, dead, smallest=None):
    """The loss of architectures.md, a term at a time; w: the parameters by name."""
    norms = w["W_dec"].norm(dim=1) if o.decoder_norm == "free" else torch.ones(L).to(x)
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    c = o.l1_coefficient if o.architecture != "jumprelu" else o.l0_coefficient
    sparsity = inner = aux = torch.zeros(()).to(x)

    def squared(f, to=L, W_dec=None, b_dec=None):
        W_dec = w["W_dec"] if W_dec is None else W_dec
        x_hat = f[:, :to] @ W_dec[:to] + (w["b_dec"] if b_dec is None else b_dec)
        return ((x_hat - x) ** 2).sum(1).mean()

    if o.architecture in ("standard", "p_anneal"):
        f = torch.relu(h)
        values = power(f, t.rule.p) if o.architecture == "p_anneal" else f
        sparsity = (values * norms).sum(1).mean()
    elif o.architecture == "gated":
        m = ((x - w["b_dec"]) @ w["W_enc"]) * w["r_mag"].exp() + w["b_mag"]
        f = (h > 0) * torch.relu(m)
        sparsity = (torch.relu(h) * norms).sum(1).mean()
        decoder = w["W_dec"], w["b_dec"]
        if o.gated_aux_decoder == "constant":
            decoder = tuple(p.detach() for p in decoder)
        inner = squared(torch.relu(h), L, *decoder)
    elif o.architecture in ("topk", "batchtopk", "matryoshka"):
        f, ranked = torch.relu(h), torch.relu(h) * norms
        if o.architecture == "topk":
            bar = ranked.topk(int(o.k), dim=1).values[:, -1:]
        else:
            bar = ranked.flatten().topk(round(o.k * len(x))).values[-1]
        f = f * (ranked >= bar)
        inner = sum(squared(f, w_) for w_ in o.matryoshka_widths[:-1])
    else:
        settings = w["threshold"], o.jumprelu_bandwidth, o.jumprelu_ste_to_input
        f = JumpReLU.apply(h, *settings)
        l0 = Step.apply(h, *settings).sum(1)
        if o.jumprelu_sparsity_loss_mode == "tanh":
            sparsity = torch.tanh(o.jumprelu_tanh_scale * f * norms).sum(1).mean()
        elif o.jumprelu_sparsity_loss_mode == "quadratic":
            sparsity = (2 / o.target_l0 * (l0 - o.target_l0) ** 2).mean()
        else:
            sparsity = l0.mean()
        if o.pre_act_loss_coefficient:
            below = torch.relu(w["threshold"] - h)[:, dead] * norms[dead]
            aux = o.pre_act_loss_coefficient * below.sum(1).mean()
    if "topk" in o.architecture or o.architecture == "matryoshka":
        e = (f @ w["W_dec"] + w["b_dec"] - x).detach()
        k_aux = min(D // 2, int(dead.sum()))
        z = torch.relu(h[:, dead])
        bar = (z * norms[dead]).topk(k_aux, dim=1).values[:, -1:]
        z = z * (z * norms[dead] >= bar)
        left = ((z @ w["W_dec"][dead] + e) ** 2).sum(1).mean()
        if o.auxk_scaling == "residual_variance":
            aux = o.auxk_coefficient * left / ((e - e.mean(0)) ** 2).sum(1).mean()
        else:
            aux = o.auxk_coefficient * min(dead.sum() / (D / 2), 1.0) * left
    return squared(f) + c * sparsity + inner + aux, f


def stepped(t, x, sparse):
    """The gradient of one step, by parameter, and its metrics; the step is not made."""
    found = {}

    def take(grad, n_rows):
        found.update({n: getattr(grad, n).clone() for n in (*PARAMETERS, "fired")})
        found.update({n: t.rule.gradient_of(n, grad).clone() for n in t.sae.EXTRA})

    t.finish_step, t.active_share = take, 0.0 if sparse else 1.0
    (metrics,) = PackStep(sparse=sparse).step([t], x, want_metrics=True)
    del t.finish_step
    return found, metrics


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_that_of_the_formula(variant, decoder_norm, sparse):
    t = trainer(variant, decoder_norm=decoder_norm)
    x, dead = batch(), t.dead.clone()
    assert dead.sum() == 33
    w = {n: p.detach().clone().requires_grad_() for n, p in t.sae.tensors.items()}
    loss, f = reference_loss(x, w, t, t.options, dead)
    loss.backward()
    if decoder_norm == "unit":
        rows = w["W_dec"].detach()
        w["W_dec"].grad -= (w["W_dec"].grad * rows).sum(1, keepdim=True) * rows
    mine, metrics = stepped(t, x, sparse)
    assert t.sparse is sparse or t.rule.always_sparse
    for name, parameter in w.items():
        scale = float(parameter.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(mine[name] / scale, parameter.grad / scale, rtol=1e-9, atol=1e-9)
    assert torch.equal(mine["fired"], (f != 0).sum(0).float())
    torch.testing.assert_close(metrics.overall, loss.detach(), rtol=1e-10, atol=0)
    assert 0 < float(metrics.l0) < 0.2 * L
    if t.rule.remedy:
        assert float(metrics.ghost) > 0 and bool(w["W_enc"].grad[:, dead].any())


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
    if t.options.architecture in ("batchtopk", "matryoshka"):
        norms = w["W_dec"].norm(dim=1)
        h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        f = h * (h * norms > max(t.rule.threshold, 0))
    else:
        _, f = reference_loss(x, w, t, t.options, t.dead)
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
