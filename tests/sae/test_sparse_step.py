"""The step from active entries alone: the dense step's sums, whatever the threads and the ranks."""

import numpy as np
import pytest
import torch

from saeray.sae import entries, sparse_step
from saeray.sae.architectures.base import PARAMETERS
from saeray.sae.architectures.standard import StandardSAE
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.trainer import SPARSE_BELOW, STEPS_PER_DECISION, SAETrainer

D, L = 13, 203  # no multiple of what is looked at together
ROWS = 2 * 1024 + 77  # two lanes and a part of one


def trainer(dtype=torch.float64, sparse=True, bias=-0.5, **changes):
    values = dict(lr=1e-2, l1_coefficient=3e-2, total_steps=100, lr_scheduler_name="constant")
    sae = initial_sae(
        D, L, seed=3, b_dec=torch.linspace(-0.2, 0.3, D), dtype=dtype, encoder_init_scale=0.5
    )
    sae.b_enc.fill_(bias)
    sae.b_enc[5] = 50.0  # fires in every row
    sae.b_enc[7:40] = -50.0  # never fire
    t = SAETrainer(sae, TrainingOptions(**(values | changes)))
    t.active_share = 0.0 if sparse else 1.0
    return t


def batch(seed=0, rows=ROWS, dtype=torch.float64):
    x = torch.randn(rows, D, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    x[3] = -0.02  # a row in which nearly nothing fires
    return x


def bits(t):
    return [getattr(t.sae, name).numpy().tobytes() for name in PARAMETERS]


def figures(metrics):
    *scalars, reconstruction = metrics
    return torch.stack([*scalars, *reconstruction]).double()


@pytest.mark.parametrize("normalization", ["centred_norm", "sum"])
@pytest.mark.parametrize("decoder_norm", ["unit", "free"])
@pytest.mark.parametrize("ghosts", [False, True])
def test_steps_are_those_of_the_dense_step(normalization, decoder_norm, ghosts):
    options = dict(mse_normalization=normalization, decoder_norm=decoder_norm,
                   use_ghost_grads=ghosts, dead_feature_window=2, gradient_clip=0.5)  # fmt: skip
    dense, sparse = trainer(sparse=False, **options), trainer(**options)
    for i in range(5):
        a, b = (PackStep().step([t], batch(i), want_metrics=True)[0] for t in (dense, sparse))
        torch.testing.assert_close(figures(b), figures(a), rtol=1e-9, atol=1e-12)
    assert sparse.sparse and not dense.sparse
    assert bits(sparse) != bits(dense)  # or both took the same way
    for name in PARAMETERS:
        theirs = getattr(dense.sae, name)
        torch.testing.assert_close(getattr(sparse.sae, name), theirs, rtol=1e-7, atol=1e-9)
    assert torch.equal(sparse.fired_in_window, dense.fired_in_window)
    assert sparse.fired_in_window[5] == 5 * ROWS and sparse.fired_in_window[7:40].sum() == 0


@pytest.mark.parametrize("rows", [1, 63, 1024])
@pytest.mark.parametrize("bias", [-60.0, 60.0])
def test_none_and_all_active(rows, bias):
    """All of them are many more entries than the buffers are made for."""
    dense, sparse = trainer(sparse=False, bias=bias), trainer(bias=bias)
    for t in (dense, sparse):
        PackStep().step([t], batch(rows=max(4, rows))[:rows])
    for name in PARAMETERS:
        theirs = getattr(dense.sae, name)
        torch.testing.assert_close(getattr(sparse.sae, name), theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_neither_threads_nor_packing_change_a_bit(compute_dtype):
    def trained(threads, together):
        made = [
            trainer(torch.float32, l1_coefficient=l1, lr=1e-3, compute_dtype=compute_dtype)
            for l1 in (1e-2, 3e-2, 1e-1)
        ]
        step = PackStep(threads)
        for i in range(4):
            x = batch(i, dtype=torch.float32)
            for group in [made] if together else [[t] for t in made]:
                step.step(group, x)
        assert all(t.sparse for t in made)
        return [bits(t) for t in made]

    alone = trained(1, together=False)
    assert trained(2, together=True) == alone
    assert trained(5, together=False) == alone


@pytest.mark.parametrize("least", [16, 1024])
def test_tiles_of_rows_cut_sums_and_leave_nothing_out(monkeypatch, least):
    """162 of 203 features are active: tiles are as small as they may be."""
    monkeypatch.setattr(entries, "LEAST_TILE_ROWS", least)
    dense, sparse = trainer(sparse=False, bias=1.0), trainer(bias=1.0)
    for t in (dense, sparse):
        PackStep().step([t], batch())
    assert entries.tile_rows(162 * ROWS, ROWS, L) == least
    for name in PARAMETERS:
        theirs = getattr(dense.sae, name)
        torch.testing.assert_close(getattr(sparse.sae, name), theirs, rtol=1e-8, atol=1e-10)
    assert torch.equal(sparse.fired_in_window, dense.fired_in_window)


def test_a_tile_has_eight_entries_of_a_feature_where_a_lane_has_them():
    # L0 32 of 4,096: one in 128 rows; 8 of them are 1,024 rows. L0 256: 8 in 128.
    assert entries.tile_rows(32 * 4096, 4096, 4096) == 1024
    assert entries.tile_rows(64 * 4096, 4096, 4096) == 512
    assert entries.tile_rows(256 * 4096, 4096, 4096) == 128
    assert entries.tile_rows(4000 * 4096, 4096, 4096) == 128
    assert entries.tile_rows(0, 4096, 4096) == 1024


def test_bfloat16_rounds_nothing_here():
    exact, narrow = trainer(torch.float32), trainer(torch.float32, compute_dtype="bfloat16")
    for t in (exact, narrow):
        PackStep().step([t], batch(dtype=torch.float32))
    assert bits(narrow) == bits(exact)


def test_a_candidate_that_is_not_above_zero_after_all_is_none():
    from saeray.sae.numba_kernels import exact_values

    x = np.array([[1.0, 2.0], [1.0, -1.0]], np.float32)
    W_enc = np.array([[1.0, 1.0], [0.5, -0.5], [-1.0, 0.5]], np.float32)
    b_enc = np.array([0.25, 0.0, 0.0], np.float32)
    offsets, feature = np.array([0, 3, 5]), np.array([0, 1, 2, 0, 1], np.int32)
    value = np.zeros(5, np.float32)
    # Row 0: 1 + 2 + 0.25; 0.5 - 1 < 0; -1 + 1 = 0. Row 1: 1 - 1 + 0.25; 0.5 + 0.5.
    assert exact_values(offsets, feature, value, x, W_enc, b_enc, np.zeros(3, np.float32)) == 3
    assert offsets.tolist() == [0, 1, 3]
    assert feature[:3].tolist() == [0, 0, 1]
    assert value[:3].tolist() == [3.25, 0.25, 1.0]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("where", ["W_enc", "W_dec", "b_enc", "b_dec", "x"])
def test_what_is_not_a_number_shows_in_the_loss(compute_dtype, where):
    t = trainer(torch.float32, compute_dtype=compute_dtype)
    x = batch(dtype=torch.float32)
    # With the sign bit, as the processor makes it of 0 * inf: as a number it would lie below 0.
    not_a_number = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)
    assert torch.isnan(not_a_number)
    (x if where == "x" else getattr(t.sae, where))[1 if where != "b_enc" else 5] = not_a_number
    (metrics,) = PackStep().step([t], x, want_metrics=True)
    assert not torch.isfinite(metrics.overall)


@pytest.mark.parametrize("after", [-1, 0, 3])
def test_the_way_is_chosen_by_what_was_active_and_goes_on_after_a_resume(after):
    """Early steps are dense; a run that is resumed in between changes its way at the same step."""

    def ways(t, steps, seed=0):
        taken = []
        for i in range(seed, seed + steps):
            PackStep().step([t], batch(i, rows=64, dtype=torch.float32))
            taken.append(t.sparse)
        return taken

    options = dict(l1_coefficient=2.0, lr=2e-2)
    whole = trainer(torch.float32, sparse=False, bias=0.0, **options)
    taken = ways(whole, 60)
    assert not any(taken[:STEPS_PER_DECISION])
    assert taken[-1]
    changes = [i for i in range(1, 60) if taken[i] != taken[i - 1]]
    assert all(i % STEPS_PER_DECISION == 0 for i in changes)

    first = trainer(torch.float32, sparse=False, bias=0.0, **options)
    stop = changes[0] + after
    ways(first, stop)
    tensors, numbers = first.state()
    weights = {k: v.detach().clone() for k, v in first.sae.named_parameters()}
    resumed = SAETrainer.resumed(StandardSAE(**weights), first.options, tensors, numbers)
    assert ways(resumed, 60 - stop, seed=stop) == taken[stop:]
    assert bits(resumed) == bits(whole)
    assert max(SPARSE_BELOW.values()) < 0.5


def test_without_numba_the_dense_step_is_made(monkeypatch):
    monkeypatch.setattr(sparse_step.importlib.util, "find_spec", lambda name: None)
    sparse_step.available.cache_clear()
    try:
        without, dense = trainer(), trainer(sparse=False)
        for t in (without, dense):
            PackStep().step([t], batch())
        assert bits(without) == bits(dense)
    finally:
        sparse_step.available.cache_clear()
