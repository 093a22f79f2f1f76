"""Several ranks per pack: the same SAE as one rank, to rounding."""

import os

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from saeray.sae.architectures import ARCHITECTURES
from saeray.sae.initial import initial_sae
from saeray.sae.options import TrainingOptions
from saeray.sae.pack_step import PackStep
from saeray.sae.ranks import Ranks
from saeray.sae.trainer import SAETrainer

B, D, L, STEPS = 100, 12, 40, 12
OUT = 7  # what a transcoder writes
# Gradients are added in another order: float32 rounding (6e-8), carried through Adam's division.
TOLERANCE = dict(rtol=1e-4, atol=2e-6)


def saes():
    """Two with ghost gradients, two that select over the whole batch, and a transcoder."""
    options = dict(lr=1e-3, lr_warm_up_steps=0, total_steps=100, dead_feature_window=2)
    of_batch = dict(k=4.5, mse_normalization="sum", decoder_norm="free", gradient_clip=1.0)
    each = [
        dict(l1_coefficient=1e-2, use_ghost_grads=True),
        dict(l1_coefficient=3e-1, use_ghost_grads=True),
        dict(architecture="batchtopk", **of_batch),
        dict(architecture="matryoshka", matryoshka_widths=(8, 20, L), **of_batch),
        dict(l1_coefficient=1e-2, use_ghost_grads=True),
    ]
    for i, of_one in enumerate(each):
        of_y = dict(b_dec_out=torch.zeros(OUT), skip=True) if i == 4 else {}
        of_one = TrainingOptions(**options | of_one)
        yield of_one, initial_sae(
            D, L, seed=i, b_dec=torch.zeros(D), dtype=torch.float32,
            architecture=ARCHITECTURES[of_one.architecture], options=of_one, **of_y,
        )  # fmt: skip


def trained(ranks, sparse=True):
    """SAEs after some steps with dead features, and what was measured on the way."""
    trainers = [SAETrainer(sae, options) for options, sae in saes()]
    for t in trainers:
        t.sae.b_enc[: L // 4] = -10.0  # dead from the start
    step = PackStep(1, ranks, sparse=sparse)
    generator = torch.Generator().manual_seed(3)
    measured = []
    for _ in range(STEPS):
        x = torch.randn(B, D, generator=generator)
        reads = [(x,)] * 4 + [(x, x[:, :OUT].abs())]
        for m in step.step(trainers, reads, want_metrics=True):
            measured += [m.mse, m.l1, m.ghost, m.overall, m.l0, m.reconstruction.explained_variance]
    for i in range(len(trainers)):  # there was something for the dead
        assert any(float(g) > 0 for g in measured[6 * i + 2 :: 6 * len(trainers)])
    weights = [p.clone() for t in trainers for p in t.rule.published().tensors.values()]
    return weights, torch.stack(measured)


def one_rank(rank, size, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
    )
    for sparse in (True, False):
        torch.save(trained(Ranks(rank, size), sparse), f"{folder}/{rank}-{sparse}.pt")
    torch.distributed.destroy_process_group()
    # Not by way of the interpreter's end: a thread of gloo that lets go of a tensor then asks for
    # it, is ended in the middle of C++, and that aborts (seen once, on a busy machine). What is
    # tested is written.
    os._exit(0)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.ci])])
def test_ranks_make_the_steps_of_one(tmp_path, size):
    torch.multiprocessing.spawn(one_rank, (size, str(tmp_path)), nprocs=size)
    for sparse in (True, False):
        alone, measured = trained(Ranks(), sparse)
        by_rank = [torch.load(tmp_path / f"{rank}-{sparse}.pt") for rank in range(size)]
        for weights, figures in by_rank:
            for mine, theirs in zip(weights, alone, strict=True):
                torch.testing.assert_close(mine, theirs, **TOLERANCE)
            torch.testing.assert_close(figures, measured, rtol=1e-4, atol=1e-5)
        for weights, _ in by_rank[1:]:  # and among each other not a bit differs
            assert all(torch.equal(a, b) for a, b in zip(weights, by_rank[0][0], strict=True))


@pytest.mark.parametrize(("n", "size"), [(1, 1), (7, 2), (2, 3)])
def test_lanes_are_shared_out_whole(n, size):
    shares = [list(Ranks(rank, size).own(range(n))) for rank in range(size)]
    assert [lane for share in shares for lane in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
