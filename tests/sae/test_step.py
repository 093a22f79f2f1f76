"""The training step against an independent float64 reference: autograd and textbook Adam."""

import math

import pytest
import torch

from saeray.sae.architectures.base import PARAMETERS
from saeray.sae.architectures.standard import StandardSAE
from saeray.sae.gradients import LANE_ROWS
from saeray.sae.initial import initial_sae
from saeray.sae.losses import sae_losses
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SAETrainer

D, L, B = 6, 17, 40


def reference_losses(x, p, l1_coefficient, normalization, dead, weighted=False):
    """The formulas written out again, one row and one feature at a time where it is clearer."""
    mean = x.mean(0)
    f = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
    x_hat = f @ p["W_dec"] + p["b_dec"]
    rows = []
    for i in range(len(x)):
        n = math.sqrt(float(((x[i] - mean) ** 2).sum())) + 1e-6
        rows.append((x_hat[i] - x[i]) ** 2 / (n if normalization == "centred_norm" else 1.0))
    mse_e = torch.stack(rows)
    mse = mse_e.sum() / len(x) if normalization == "sum" else mse_e.mean()
    weights = [p["W_dec"][j].square().sum().sqrt() if weighted else 1.0 for j in range(L)]
    l1 = sum(f[:, j].abs().sum() * weights[j] for j in range(L)) / len(x)
    ghost = torch.zeros((), dtype=x.dtype)
    if dead.any():
        r = (x - x_hat).detach()
        h = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        g = torch.exp(h[:, dead]) @ p["W_dec"][dead]
        g = g * (r.norm(dim=1) / (1e-6 + 2 * g.norm(dim=1))).detach()[:, None]
        n = (r - r.mean(0)).norm(dim=1, keepdim=True) + 1e-6
        gm = (g - r) ** 2 / (n if normalization == "centred_norm" else 1.0)
        ghost = ((mse_e / (gm + 1e-6)).detach() * gm).mean()
        ghost = ghost * (D if normalization == "sum" else 1)
    return mse, l1, ghost, mse + l1_coefficient * l1 + ghost


class ReferenceAdam:
    """Adam as its paper has it, moment by moment."""

    def __init__(self, beta1=0.9, beta2=0.999):
        self.beta1, self.beta2, self.t, self.m, self.v = beta1, beta2, 0, {}, {}

    def update(self, p, grads, lr):
        self.t += 1
        for k, g in grads.items():
            self.m[k] = self.beta1 * self.m.get(k, 0) + (1 - self.beta1) * g
            self.v[k] = self.beta2 * self.v.get(k, 0) + (1 - self.beta2) * g * g
            m = self.m[k] / (1 - self.beta1**self.t)
            v = self.v[k] / (1 - self.beta2**self.t)
            p[k] = p[k] - lr * m / (v.sqrt() + 1e-8)


def reference_step(p, adam, x, lr, l1, normalization, dead, unit=True, clip=None):
    p = dict(p)
    if unit:
        p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
    leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
    losses = reference_losses(x, leaves, l1, normalization, dead, weighted=not unit)
    losses[3].backward()
    grads = {k: v.grad for k, v in leaves.items()}
    if unit:
        row = p["W_dec"]
        grads["W_dec"] = grads["W_dec"] - (grads["W_dec"] * row).sum(1, keepdim=True) * row
    if clip is not None:
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        grads = {k: g * min(1.0, clip / (norm + 1e-6)) for k, g in grads.items()}
    adam.update(p, grads, lr)
    return p, [loss.detach() for loss in losses]


def options(**changes):
    values = dict(
        lr=1e-2, l1_coefficient=3e-2, total_steps=100, lr_scheduler_name="constant",
        dead_feature_window=1000,
    )  # fmt: skip
    return TrainingOptions(**(values | changes))


def new_trainer(seed=0, dtype=torch.float64, d_sae=L, d_in=D, **changes):
    b_dec = torch.linspace(-0.2, 0.3, d_in, dtype=dtype)
    return SAETrainer(
        initial_sae(d_in, d_sae, seed=seed, b_dec=b_dec, dtype=dtype), options(**changes)
    )


@pytest.mark.parametrize("normalization", ["centred_norm", "none", "sum"])
@pytest.mark.parametrize("ghosts", [False, True])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
def test_steps_agree_with_the_float64_reference(normalization, ghosts, decoder_norm):
    unit = decoder_norm == "unit"
    t = new_trainer(
        mse_normalization=normalization, use_ghost_grads=ghosts, decoder_norm=decoder_norm
    )
    if not unit:
        t.sae.W_dec *= torch.linspace(0.2, 1.7, L, dtype=torch.float64)[:, None]
    dead = torch.zeros(L, dtype=torch.bool)
    if ghosts:
        # A silenced feature can't come back within three steps of lr 0.01.
        dead[[2, 5, 11]] = True
        t.sae.b_enc[dead] = -3.0
        t.steps_since_fired[dead] = 1001
    p = {k: getattr(t.sae, k).detach().clone() for k in PARAMETERS}
    adam, step = ReferenceAdam(), PackStep()
    for i in range(3):
        x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        p, losses = reference_step(p, adam, x, 1e-2, 3e-2, normalization, dead, unit)
        (metrics,) = step.step([t], x, want_metrics=True)
        got = (metrics.mse, metrics.l1, metrics.ghost, metrics.overall)
        for name, mine, theirs in zip(("mse", "l1", "ghost", "overall"), got, losses, strict=True):
            assert float(mine) == pytest.approx(float(theirs), rel=1e-12), name
        if ghosts:  # its value is about the mse by construction
            assert float(metrics.ghost) == pytest.approx(float(metrics.mse), rel=1e-2)
    if unit:
        p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)
    for k in PARAMETERS:
        torch.testing.assert_close(getattr(t.sae, k).detach(), p[k], rtol=1e-10, atol=1e-12)


def test_warm_up_decay_and_clipping_agree_with_the_float64_reference():
    # L1 0, 1/4, 2/4 …; lr constant for 6 of 10 steps, then 4/4, 3/4, 2/4, 1/4 of it.
    t = new_trainer(
        total_steps=10, l1_warm_up_steps=4, lr_decay_steps=4, gradient_clip=0.05,
        mse_normalization="sum", decoder_norm="free",
    )  # fmt: skip
    p = {k: getattr(t.sae, k).detach().clone() for k in PARAMETERS}
    adam, step, none = ReferenceAdam(), PackStep(), torch.zeros(L, dtype=torch.bool)
    l1 = [0.0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]
    lr = [1, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    for i in range(10):
        x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        assert t.coefficient == pytest.approx(3e-2 * l1[i])
        assert t.lr == pytest.approx(1e-2 * lr[i])
        p, losses = reference_step(
            p, adam, x, 1e-2 * lr[i], 3e-2 * l1[i], "sum", none, unit=False, clip=0.05
        )
        (metrics,) = step.step([t], x, want_metrics=True)
        assert float(metrics.overall) == pytest.approx(float(losses[3]), rel=1e-9)
    for k in PARAMETERS:
        torch.testing.assert_close(getattr(t.sae, k).detach(), p[k], rtol=1e-9, atol=1e-11)


def test_ghost_gradients_stay_finite_where_exp_would_not():
    # exp(150) is 1.4e65, beyond float32; six dead features see one such row.
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(5))
    x[3, 0] = 150.0
    moments = {}
    for dtype in (torch.float32, torch.float64):
        t = new_trainer(dtype=dtype, use_ghost_grads=True, mse_normalization="none")
        t.sae.W_enc[0, :6] = torch.linspace(1.0, 1.1, 6, dtype=dtype)
        t.steps_since_fired[:6] = 1001
        (metrics,) = PackStep().step([t], x.to(dtype), want_metrics=True)
        assert math.isfinite(float(metrics.ghost))
        moments[dtype] = {k: t.adam.state[getattr(t.sae, k)]["exp_avg"] for k in PARAMETERS}
    for k in PARAMETERS:
        single, double = moments[torch.float32][k], moments[torch.float64][k]
        assert torch.isfinite(single).all()
        torch.testing.assert_close(single.double(), double, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_an_sae_of_scaled_activations_is_the_same_in_their_own_units(scale):
    x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scaled, again = new_trainer(), new_trainer()
    scaled.activation_scale = scale
    (mine,) = PackStep().step([scaled], x, want_metrics=True)
    (theirs,) = PackStep().step([again], x * scale, want_metrics=True)
    assert bits(scaled) == bits(again)
    assert float(mine.overall) == float(theirs.overall)
    folded = scaled.published
    torch.testing.assert_close(folded.encode(x), scaled.sae.encode(x * scale))
    torch.testing.assert_close(folded(x), scaled.sae(x * scale) / scale)


def test_where_an_encoder_starts():
    start = dict(seed=3, b_dec=torch.zeros(D), dtype=torch.float32)
    transposed = initial_sae(
        D, L, encoder_init="decoder_transpose", encoder_init_scale=0.1, decoder_init_norm=2.0,
        **start,
    )  # fmt: skip
    torch.testing.assert_close(transposed.W_dec.norm(dim=1), torch.full((L,), 2.0))
    torch.testing.assert_close(transposed.W_enc, 0.1 * transposed.W_dec.t())
    independent = initial_sae(D, L, **start)
    cosines = torch.nn.functional.cosine_similarity(independent.W_enc.t(), independent.W_dec)
    assert cosines.abs().min() < 0.3
    with pytest.raises(ValueError, match="encoder_init 'tied'"):
        initial_sae(D, L, encoder_init="tied", **start)


def test_losses_module_agrees_with_the_reference_too():
    t = new_trainer()
    x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    dead = torch.zeros(L, dtype=torch.bool)
    dead[3] = True
    p = {k: getattr(t.sae, k) for k in PARAMETERS}
    mine = sae_losses(x, **p, l1_coefficient=0.1, dead=dead)
    theirs = reference_losses(x, p, 0.1, "centred_norm", dead)
    for a, b in zip(mine, theirs, strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_one_number_by_hand():
    # d_in = d_sae = 1, x = [1, 3], W_enc = 2, W_dec = 1, b = 0: f = [2, 6], error = [1, 3].
    # mse_normalization none: mse = (1 + 9) / 2 = 5; l1 = (2 + 6) / 2 = 4.
    # centred: x - 2 = [-1, 1], norms 1, so the same up to the 1e-6.
    one = torch.ones(1, 1, dtype=torch.float64)
    x = torch.tensor([[1.0], [3.0]], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    plain = sae_losses(x, 2 * one, one, zero, zero, l1_coefficient=0.5, normalization="none")
    assert (float(plain.mse), float(plain.l1), float(plain.overall)) == (5.0, 4.0, 7.0)
    centred = sae_losses(x, 2 * one, one, zero, zero, l1_coefficient=0.5)
    assert float(centred.mse) == pytest.approx(5.0 / (1 + 1e-6))


def test_two_learning_rates_differ_after_one_step_by_what_adam_predicts():
    # Adam's first step moves every weight by lr * g / (|g| + 1e-8): b_dec by lr up or down.
    x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    start = new_trainer().sae.b_dec.clone()
    for lr in (1e-3, 4e-3):
        t = new_trainer(lr=lr)
        PackStep().step([t], x)
        moved = (t.sae.b_dec - start).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-4, atol=0)


def bits(t):
    return b"".join(getattr(t.sae, k).detach().numpy().tobytes() for k in PARAMETERS)


@pytest.mark.parametrize("ghosts", [False, True])
def test_threads_and_packing_do_not_change_a_bit(ghosts):
    rows = 2 * LANE_ROWS + 300  # three lanes, the last one short

    def run(threads, seeds):
        trainers = [
            new_trainer(s, torch.float32, 64, use_ghost_grads=ghosts, dead_feature_window=1)
            for s in seeds
        ]
        step = PackStep(threads)
        for i in range(6):
            x = torch.randn(rows, D, generator=torch.Generator().manual_seed(i))
            for t in trainers:  # something must be dead, or no ghost is exercised
                t.steps_since_fired[:5] = 10 * ghosts
            step.step(trainers, x)
        return {s: bits(t) for s, t in zip(seeds, trainers, strict=True)}

    together = run(1, [0, 1, 2])
    assert run(2, [0, 1, 2]) == together
    assert run(3, [2, 1, 0]) == together
    assert {s: run(2, [s])[s] for s in (0, 1, 2)} == together
    assert together[0] != together[1]


def test_each_sae_of_a_pack_is_stepped_on_what_it_is_handed():
    """Three SAEs at two hook points of different widths, the batches of which are other ones."""

    def trained(*seeds):
        trainers = [new_trainer(s, torch.float32, 64, d_in=D + s % 2) for s in seeds]
        step = PackStep(2)
        for i in range(3):
            g = torch.Generator().manual_seed(i)
            at = [torch.randn(50, d_in, generator=g) for d_in in (D, D + 1)]
            step.step(trainers, [(at[s % 2],) for s in seeds])
        return {s: bits(t) for s, t in zip(seeds, trainers, strict=True)}

    assert trained(0, 1, 2) == {**trained(0), **trained(1), **trained(2)}
    assert PackStep().step([], []) == []


def test_state_restores_exactly():
    batches = [torch.randn(B, D, generator=torch.Generator().manual_seed(i)) for i in range(9)]
    changes = dict(feature_sampling_window=4, use_ghost_grads=True, dead_feature_window=2)
    whole = new_trainer(dtype=torch.float32, **changes)
    for x in batches:
        PackStep().step([whole], x)
    first = new_trainer(dtype=torch.float32, **changes)
    for x in batches[:5]:
        PackStep().step([first], x)
    tensors, numbers = first.state()
    weights = {k: getattr(first.sae, k).detach().clone() for k in PARAMETERS}
    resumed = SAETrainer.resumed(StandardSAE(**weights), first.options, tensors, numbers)
    assert torch.equal(resumed.firing_frequency, first.firing_frequency)  # of steps 0 to 3
    for x in batches[5:]:
        PackStep().step([resumed], x)
    assert bits(resumed) == bits(whole)
    assert torch.equal(resumed.firing_frequency, whole.firing_frequency)
    assert resumed.step == whole.step == 9


def test_firing_statistics_start_anew_every_window():
    t = new_trainer(feature_sampling_window=2)
    for i in range(3):
        x = torch.randn(B, D, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        before = (t.sae.encode(x) > 0).sum(0)
        PackStep().step([t], x)
    # Steps 0 and 1 filled a window; step 2 began the next one, with its own batch only.
    assert t.tokens_in_window == B
    assert torch.equal(t.fired_in_window, before)
    assert t.last_frequency.max() > 0


def test_what_is_reported_comes_from_the_last_full_window():
    """Just after a window of 20 batches the next one has 64 rows, in which most are silent."""
    window, rows = 20, 64
    changes = dict(feature_sampling_window=window, dead_feature_threshold=1e-6)
    t = new_trainer(d_sae=256, lr=1e-9, **changes)
    t.sae.b_enc[:] = torch.linspace(-0.8, -0.3, 256, dtype=torch.float64)  # rare to common
    fired, reported = [], []
    for i in range(3 * window):
        x = torch.randn(rows, D, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        fired.append((t.sae.encode(x) > 0).sum(0))
        PackStep().step([t], x)
        reported.append(t.feature_metrics()["sparsity/below_dead_feature_threshold"])
        full = (i + 1) // window * window  # steps in full windows
        seen = torch.stack(fired[full - window : full] if full else fired)
        assert torch.equal(t.firing_frequency, seen.sum(0).double() / (len(seen) * rows)), i
    silent_in_one_batch = int((fired[2 * window] == 0).sum())
    assert reported[2 * window - 1] == reported[2 * window]
    assert 0 < reported[2 * window] < silent_in_one_batch / 1.5


def test_dead_features_are_those_silent_longer_than_the_window():
    t = new_trainer(dead_feature_window=2)
    t.sae.b_enc[4] = -100.0
    for i in range(3):
        assert not t.dead[4], f"after {i} steps"
        PackStep().step([t], torch.randn(B, D, dtype=torch.float64))
    assert t.dead[4]  # silent for 3 > 2 steps
    assert int(t.dead.sum()) == t.feature_metrics()["sparsity/dead_features"]


def test_reports_count_features_below_the_threshold():
    t = new_trainer(dead_feature_threshold=0.25)
    t.fired_in_window[:] = torch.arange(L)
    t.tokens_in_window = 40  # frequencies 0/40 … 16/40: ten of them (0 … 9) are below a quarter
    assert t.feature_metrics()["sparsity/below_dead_feature_threshold"] == 10
