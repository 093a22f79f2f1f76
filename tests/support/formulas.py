"""Every architecture's loss as its paper has it, for autograd in float64."""

import torch

from saeray.sae.architectures import ARCHITECTURES
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


def trainer(variant, dtype=torch.float64, output=None, skip=False, **changes):
    """output: of a transcoder, how wide y is."""
    values = dict(lr=1e-2, total_steps=40, lr_scheduler_name="constant", mse_normalization="sum")
    options = TrainingOptions(**(values | VARIANTS[variant] | changes))
    free = options.decoder_norm == "free"
    sae = initial_sae(
        D, L, seed=3, b_dec=torch.linspace(-0.2, 0.3, D), dtype=dtype,
        encoder_init_scale=0.5, architecture=ARCHITECTURES[options.architecture], options=options,
        b_dec_out=None if output is None else torch.linspace(0.4, -0.1, output), skip=skip,
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
    if skip:
        sae.W_skip.copy_(0.1 * torch.randn(D, output, generator=generator))
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


def target(x, output):
    """What a transcoder is to make of x: nothing that is linear in it."""
    generator = torch.Generator().manual_seed(9)
    hidden = torch.relu(x @ torch.randn(D, 20, generator=generator).to(x))
    return hidden @ torch.randn(20, output, generator=generator).to(x) / 5


def reference_loss(x, w, t, o, dead, y=None):
    """The loss of architectures.md, a term at a time; w: the parameters by name.

    y: of a transcoder.
    """
    b_out, y = w.get("b_dec_out", w["b_dec"]), x if y is None else y
    out = y.shape[1]
    norms = w["W_dec"].norm(dim=1) if o.decoder_norm == "free" else torch.ones(L).to(x)
    h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    c = o.l1_coefficient if o.architecture != "jumprelu" else o.l0_coefficient
    sparsity = inner = aux = torch.zeros(()).to(x)

    def reconstructed(f, W_dec, b_dec, W_skip=None):
        skipped = 0.0 if W_skip is None else x @ W_skip
        return f @ W_dec + b_dec + skipped

    def squared(f, to=L, decoder=None):
        W_dec, *rest = decoder or (w["W_dec"], b_out, w.get("W_skip"))
        return ((reconstructed(f[:, :to], W_dec[:to], *rest) - y) ** 2).sum(1).mean()

    if o.architecture in ("standard", "p_anneal"):
        f = torch.relu(h)
        values = power(f, t.rule.p) if o.architecture == "p_anneal" else f
        sparsity = (values * norms).sum(1).mean()
    elif o.architecture == "gated":
        m = ((x - w["b_dec"]) @ w["W_enc"]) * w["r_mag"].exp() + w["b_mag"]
        f = (h > 0) * torch.relu(m)
        sparsity = (torch.relu(h) * norms).sum(1).mean()
        decoder = w["W_dec"], b_out, *([w["W_skip"]] if "W_skip" in w else [])
        if o.gated_aux_decoder == "constant":
            decoder = tuple(p.detach() for p in decoder)
        inner = squared(torch.relu(h), L, decoder)
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
        e = (reconstructed(f, w["W_dec"], b_out, w.get("W_skip")) - y).detach()
        k_aux = min(out // 2, int(dead.sum()))
        z = torch.relu(h[:, dead])
        bar = (z * norms[dead]).topk(k_aux, dim=1).values[:, -1:]
        z = z * (z * norms[dead] >= bar)
        left = ((z @ w["W_dec"][dead] + e) ** 2).sum(1).mean()
        if o.auxk_scaling == "residual_variance":
            aux = o.auxk_coefficient * left / ((e - e.mean(0)) ** 2).sum(1).mean()
        else:
            aux = o.auxk_coefficient * min(dead.sum() / (out / 2), 1.0) * left
    return squared(f) + c * sparsity + inner + aux, f


def trained_latents(x, w, t, y=None):
    """f of what was trained, as it is used: of the batch's k by the threshold kept for it."""
    if t.options.architecture in ("batchtopk", "matryoshka"):
        norms = w["W_dec"].norm(dim=1)
        h = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        return h * (h * norms > max(t.rule.threshold, 0))
    return reference_loss(x, w, t, t.options, t.dead, y)[1]


def stepped(t, x, sparse, y=None):
    """The gradient of one step, by parameter, and its metrics; the step is not made."""
    found = {}

    def take(grad, n_rows):
        found.update({n: getattr(grad, n).clone() for n in (*t.sae.common, "fired")})
        found.update({n: t.rule.gradient_of(n, grad).clone() for n in t.sae.EXTRA})

    t.finish_step, t.active_share = take, 0.0 if sparse else 1.0
    read = [(x,)] if y is None else [(x, y)]
    (metrics,) = PackStep(sparse=sparse).step([t], read, want_metrics=True)
    del t.finish_step
    return found, metrics


def check_against_formula(t, x, sparse, y=None):
    """The step's gradient and value are those of the formula."""
    dead = t.dead.clone()
    assert dead.sum() == 33
    w = {n: p.detach().clone().requires_grad_() for n, p in t.sae.tensors.items()}
    loss, f = reference_loss(x, w, t, t.options, dead, y)
    loss.backward()
    if t.options.decoder_norm == "unit":
        rows = w["W_dec"].detach()
        w["W_dec"].grad -= (w["W_dec"].grad * rows).sum(1, keepdim=True) * rows
    mine, metrics = stepped(t, x, sparse, y)
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
