"""Resampling: which features, which rows, what they become, and what the learning rate does."""

import pytest
import torch
from support.training import gone_on_from

from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.resampling import batches_of, choose_rows, is_due, lr_factor, ramp_steps
from saeray.sae.trainer import SAETrainer

D, L = 8, 24
DEAD = slice(3, 9)


def trainer(architecture="standard", dtype=torch.float32, **changes):
    values = dict(
        lr=1e-3, l1_coefficient=0.01, total_steps=100, feature_sampling_method="l2", seed=5,
        dead_feature_window=4, feature_sampling_window=50, lr_scheduler_name="constant",
        mse_normalization="sum", architecture=architecture,
    )  # fmt: skip
    options = TrainingOptions(**(values | changes))
    sae = initial_sae(
        D, L, seed=1, b_dec=torch.zeros(D), dtype=dtype, encoder_init="decoder_transpose",
        architecture=ARCHITECTURES[architecture], options=options,
    )  # fmt: skip
    sae.b_enc[DEAD] = -50.0
    return SAETrainer(sae, options)


def batch(i, rows=256):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(i))


def stepped(pack, t, x):
    """A step, and what a pack does after it: rows of this batch stand in for the harvesters'."""
    pack.step([t], x)
    if t.wants_rows:
        t.resample(x, (t.sae(x) - x).square().sum(dim=1))


@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "p_anneal"])
def test_dead_features_take_the_place_of_rows(architecture, decoder_norm):
    t, pack = trainer(architecture, decoder_norm=decoder_norm), PackStep()
    if decoder_norm == "free":
        t.sae.W_dec.mul_(0.5)
    for i in range(4):
        assert t.resampled is None
        stepped(pack, t, batch(i))
    assert (t.resampled, t.n_resampled) == (4, 6)
    W_enc, W_dec, living = t.sae.W_enc.t(), t.sae.W_dec, torch.ones(L, dtype=torch.bool)
    living[DEAD] = False
    x = batch(3)
    unit = x / x.norm(dim=1, keepdim=True)
    write = W_dec[living].norm(dim=1).mean()
    rows = [int((unit @ d / d.norm()).argmax()) for d in W_dec[DEAD]]
    assert len(set(rows)) == 6
    torch.testing.assert_close(W_dec[DEAD], unit[rows] * write)
    torch.testing.assert_close(W_enc[DEAD], unit[rows] * 0.2 * W_enc[living].norm(dim=1).mean())
    for name in ("b_enc", *t.sae.EXTRA):
        assert not t.sae.tensors[name][DEAD].any()
    for name, parameter in t.sae.tensors.items():
        for key in ("exp_avg", "exp_avg_sq"):
            moment = t.adam.state[parameter][key]
            moment = moment.t() if name == "W_enc" else moment
            if name != "b_dec":
                assert not moment[DEAD].any()
            assert moment[living if name != "b_dec" else slice(None)].any()
    assert not t.steps_since_fired[DEAD].any()


def test_they_live_and_without_it_they_do_not():
    fired = {}
    for method in ("l2", None):
        t, pack = trainer(feature_sampling_method=method, lr=0.0), PackStep()
        for i in range(4):
            stepped(pack, t, batch(i))
        t.fired_in_window.zero_()
        stepped(pack, t, batch(4))
        fired[method] = int((t.fired_in_window[DEAD] > 0).sum())
    assert fired == {"l2": 6, None: 0}


def test_rows_are_chosen_by_their_weight():
    weights = torch.tensor([0.0, 1.0, 0.0, 9.0, float("nan"), float("inf")])
    picked = [int(choose_rows(weights, 1, 0, step)[0]) for step in range(2000)]
    assert set(picked) == {1, 3}
    assert picked.count(3) / 2000 == pytest.approx(0.9, abs=0.03)  # 4.5 standard deviations
    assert sorted(choose_rows(weights, 6, 0, 0).tolist()) == [1, 3]
    assert torch.equal(choose_rows(weights, 2, 7, 9), choose_rows(weights, 2, 7, 9))
    many = torch.ones(1000)
    assert not torch.equal(choose_rows(many, 9, 7, 9), choose_rows(many, 9, 8, 9))
    assert len(choose_rows(torch.zeros(4), 3, 0, 0)) == 0


def test_a_row_of_zeros_gives_no_direction():
    t = trainer(lr=0.0)
    for i in range(4):
        PackStep().step([t], batch(i))
    assert t.wants_rows
    t.resample(torch.stack([torch.zeros(D), torch.ones(D)]), torch.tensor([9.0, 1.0]))
    assert t.n_resampled == 1
    assert all(bool(torch.isfinite(p).all()) for p in t.sae.tensors.values())


def test_rows_are_scaled_as_the_sae_sees_them():
    weights = []
    for scale in (1.0, 4.0):
        t = SAETrainer(
            trainer(decoder_norm="free").sae, trainer(decoder_norm="free").options, scale
        )
        for i in range(4):
            PackStep().step([t], batch(i) / scale)
        t.resample(batch(9) / scale, torch.ones(256))
        weights.append(t.sae.W_dec[DEAD])
    torch.testing.assert_close(*weights)


def test_the_lm_batches_that_rows_come_from():
    # 32 of them; the last of which something was trained on, of what there is.
    assert batches_of(n_rows=1, block_rows=10, n_blocks=100) == range(32)
    assert batches_of(n_rows=330, block_rows=10, n_blocks=100) == range(1, 33)
    assert batches_of(n_rows=335, block_rows=10, n_blocks=100) == range(2, 34)
    assert batches_of(n_rows=1000, block_rows=10, n_blocks=100) == range(68, 100)
    assert batches_of(n_rows=30, block_rows=10, n_blocks=5) == range(5)


def test_the_learning_rate_begins_again():
    t, pack = trainer(), PackStep()
    assert ramp_steps(100) == 10 and ramp_steps(10**6) == 10_000
    for i in range(4):
        assert t.lr == 1e-3
        stepped(pack, t, batch(i))
    climb = [1e-4 + 0.9999 * k / 10 for k in range(4)]
    for k in range(4):
        assert t.lr == pytest.approx(1e-3 * climb[k])
        stepped(pack, t, batch(4 + k))
    o = t.options
    assert lr_factor(o, 14, 4) == 1.0 and lr_factor(o, 3, None) == 1.0


def test_not_towards_the_end():
    o = trainer().options  # 100 steps, every 4, a ramp of 10
    assert [s for s in range(1, 101) if is_due(o, s)] == list(range(4, 81, 4))
    late = trainer(dead_feature_window=40).options
    assert [s for s in range(1, 101) if is_due(late, s)] == [40]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(threads):
    def advanced(t, first, last):
        for i in range(first, last):
            stepped(pack, t, batch(i))
        return t

    pack = PackStep(threads)
    whole, half = advanced(trainer(), 0, 14), advanced(trainer(), 0, 7)
    again = gone_on_from(half)
    advanced(again, 7, 14)
    assert whole.n_resampled == again.n_resampled >= 6 and whole.lr == again.lr
    assert all(torch.equal(p, again.sae.tensors[n]) for n, p in whole.sae.tensors.items())
