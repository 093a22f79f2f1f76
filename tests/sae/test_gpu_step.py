"""The sparse step on a GPU: against autograd and textbook Adam in float64.

Where there is a GPU, on it. Elsewhere in Triton's interpreter, which Triton decides on when it is
imported: in a process of its own, which `test_in_tritons_interpreter` starts. What that can't show,
whether the kernels compile for a GPU, `test_the_kernels_compile_for_a_gpu_that_is_not_here` does.
"""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saeray.sae.architectures.standard import StandardSAE
from saeray.sae.gpu import sparse_step as gpu_step
from saeray.sae.gpu.adam import HalfWeights, adam_rates, fused_adam_rows
from saeray.sae.gpu.dense_step import DenseSpace, dense_gradients
from saeray.sae.gpu.sparse_step import CudaSpace, sparse_gradients
from saeray.sae.gradients import Batch, Gradients
from saeray.sae.losses import MSE_NORMALIZATIONS, sae_losses

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
interpreted = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="by test_in_tritons_interpreter"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="starts the interpreted tests")

# No size is a multiple of a block's: of 32 rows, of 32 features to a word, of a row's width.
B, L, D = 33, 35, 12
EVERYWHERE, NOWHERE, EMPTY_ROW = 3, 5, 7
HOT = 16  # entries, so the feature that is active everywhere is summed in chunks


def python(code_or_file, **environment):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, *code_or_file],
        env=os.environ | environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@compiled
@pytest.mark.slow
@pytest.mark.ci
def test_in_tritons_interpreter():
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    assert " passed" in python(arguments, TRITON_INTERPRET="1")


@compiled
def test_the_kernels_compile_for_a_gpu_that_is_not_here(tmp_path):
    file = Path(__file__).parents[1] / "support" / "compile_kernels.py"
    path = os.pathsep.join(p for p in sys.path if p)
    said = python([str(file)], TRITON_CACHE_DIR=str(tmp_path), PYTHONPATH=path)
    kernels = set(said.split())
    assert kernels >= {"nominate", "encode_and_nominate", "evaluate", "gradients", "adam_rows"}


@compiled
def test_only_a_gpu_has_the_sparse_step():
    assert not gpu_step.available(torch.device("cpu"))


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch):
    """So that every loop has more than one turn."""
    for name, n in dict(N_WORKERS=2, GROUPS_AT_ONCE=1, WORDS_AT_ONCE=2).items():
        monkeypatch.setattr(gpu_step, name, n)


def an_sae(threshold=-1.5):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, L, D, generator=generator)
    rows /= rows.norm(dim=2, keepdim=True)
    b_enc = torch.full((L,), threshold)
    b_enc[EVERYWHERE], b_enc[NOWHERE] = 20.0, -50.0
    b_dec = 0.1 * torch.randn(D, generator=generator)
    return StandardSAE(rows[0].t(), rows[1], b_enc, b_dec).to(DEVICE)


def rows_of_x():
    return torch.randn(B, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def step(sae, x, *, compute_dtype="float32", normalization="none", weighted=False, **more):
    """The gradients, x̂ - x, and the buffers."""
    room = more.pop("room", None)
    half = more.pop("half", None)
    gradients = sparse_gradients
    if more.pop("dense", False):
        space, gradients = DenseSpace(sae, B, compute_dtype), dense_gradients
    else:
        space = CudaSpace(sae, B, compute_dtype, hot=HOT, **more)
    if room is not None:
        space.make_room(sae, room)
    out, errors = Gradients(sae), torch.full_like(x, math.nan)
    for tensor in out.tensors():  # whatever was there before
        tensor.fill_(math.nan)
    penalty = torch.tensor(1e-2 / B, device=DEVICE)
    gradients(
        sae, Batch.of(x, normalization), want_l1=True, errors=errors, out=out,
        penalty=penalty * sae.W_dec.norm(dim=1) if weighted else penalty, space=space, half=half,
    )  # fmt: skip
    return out, errors, space


def reference(sae, x, normalization, weighted=False):
    p = {k: getattr(sae, k).detach().double().requires_grad_() for k in PARAMETERS}
    x = x.double()
    losses = sae_losses(
        x, **p, l1_coefficient=1e-2, normalization=normalization, weighted_l1=weighted
    )
    losses.overall.backward()
    f = torch.relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]).detach()
    error = f @ p["W_dec"].detach() + p["b_dec"].detach() - x
    grads = {k: v.grad for k, v in p.items()}
    return SimpleNamespace(**grads, f=f, errors=error, l1=losses.l1.detach())


def assert_agree(sae, x, out, errors, expected, weighted=False, tolerance=1e-5):
    total = {k: getattr(out, k).clone() for k in PARAMETERS}
    if weighted:
        norms = sae.W_dec.norm(dim=1)
        out.add_weighted_l1_(sae.W_dec, norms, 1e-2 / B)
        total["W_dec"] = out.W_dec
    total["b_dec"] -= out.b_enc @ sae.W_enc.t()
    got = {**total, "f": out.f, "errors": errors, "l1": out.l1 / B}
    wanted = dict(vars(expected), f=expected.f.sum(0))
    for name, value in got.items():
        wrong = (value.double() - wanted[name]).norm()
        assert float(wrong) <= tolerance * float(wanted[name].norm()) + 1e-9, name
    if tolerance <= 1e-5:
        assert torch.equal(out.fired.double(), (expected.f > 0).sum(0).double())


@interpreted
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("normalization", "weighted"), list(zip(MSE_NORMALIZATIONS, (False, True, True), strict=True))
)
def test_gradients_agree_with_the_float64_reference(normalization, weighted, dense):
    sae, x = an_sae(), rows_of_x()
    if weighted:
        sae.W_dec *= torch.linspace(0.2, 1.7, L, device=DEVICE)[:, None]
    expected = reference(sae, x, normalization, weighted)
    assert (expected.f[:, EVERYWHERE] > 0).all() and not (expected.f[:, NOWHERE] > 0).any()
    assert 2 * B < int((expected.f > 0).sum()) < B * L / 4
    out, errors, _ = step(sae, x, normalization=normalization, weighted=weighted, dense=dense)
    assert_agree(sae, x, out, errors, expected, weighted)


@interpreted
@pytest.mark.parametrize("threshold", [-1.5, -50.0])
def test_rows_without_an_active_feature_are_reconstructed_as_b_dec(threshold):
    sae, x = an_sae(threshold=threshold), rows_of_x()
    sae.b_enc[EVERYWHERE] = threshold
    x[EMPTY_ROW] = sae.b_dec  # so its pre-activations are b_enc
    expected = reference(sae, x, "centred_norm")
    assert not expected.f[EMPTY_ROW].any() and bool(expected.f.any()) == (threshold == -1.5)
    out, errors, _ = step(sae, x, normalization="centred_norm")
    assert not errors[EMPTY_ROW].any()
    assert_agree(sae, x, out, errors, expected)


@interpreted
def test_room_and_how_entries_are_found_do_not_change_a_bit(monkeypatch):
    sae, x = an_sae(), rows_of_x()
    out, errors, space = step(sae, x)
    assert 16 < int(space.total) <= space.capacity
    # float32: the interpreter multiplies bfloat16 as the integers that it keeps them in.
    monkeypatch.setattr(gpu_step, "WORDS_AT_ONCE", 1)
    again, again_errors, space = step(sae, x, room=1, fused_encoder=True)  # for 16 entries
    assert int(space.total) <= space.capacity < 2 * int(space.total)
    assert bits(again, again_errors) == bits(out, errors)


@interpreted
@pytest.mark.parametrize("given", [True, False])
def test_dense_bfloat16_agrees_with_the_reference_to_its_precision(given):
    sae, x = an_sae(), rows_of_x()
    expected = reference(sae, x, "none")
    half = HalfWeights(sae) if given else None
    out, errors, _ = step(sae, x, compute_dtype="bfloat16", half=half, dense=True)
    # Here f itself is rounded, so who fires is not quite float32's.
    assert_agree(sae, x, out, errors, expected, tolerance=3e-2)


@interpreted
def test_bfloat16_agrees_with_the_reference_to_its_precision():
    sae, x = an_sae(), rows_of_x()
    expected = reference(sae, x, "none")
    out, errors, _ = step(sae, x, compute_dtype="bfloat16", half=HalfWeights(sae))
    # bfloat16 has 2^-9, the interpreter's 2^-8; but f, and so who fires, is float32's.
    assert_agree(sae, x, out, errors, expected, tolerance=2e-2)
    torch.testing.assert_close(out.f.double(), expected.f.sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(out.fired.long(), (expected.f > 0).sum(0))


def unpacked(words, axis):
    """Bits [.., 32 n, ..] of int32 words [.., n, ..]."""
    bit = torch.arange(32, device=DEVICE).view((32,) + (1,) * (1 - axis))
    lanes = (words.unsqueeze(axis + 1) >> bit) & 1
    return lanes.flatten(axis, axis + 1).bool()


@interpreted
def test_bits_and_counts_of_several_blocks_of_rows_and_features():
    rows, features = 140, 150  # 128 and 12, 128 and 22
    generator = torch.Generator().manual_seed(2)
    W, x = torch.randn(features, D, generator=generator), torch.randn(rows, D, generator=generator)
    sae = StandardSAE(W.t(), W.clone(), torch.full((features,), -4.0), torch.zeros(D)).to(DEVICE)
    x = x.to(DEVICE)
    h = (x @ sae.W_enc + sae.b_enc).double()
    for more in (dict(chunk_bytes=1), dict(fused_encoder=True)):
        space = CudaSpace(sae, rows, "float32", **more)
        assert space.chunk_rows == (128 if more.get("chunk_bytes") else rows)
        gpu_step.select(sae, Batch.of(x, "none"), space, None)
        active = unpacked(space.by_feature, 0)[:rows]
        assert torch.equal(active, unpacked(space.by_row, 1)[:, :features])
        assert active[h > 1e-4].all() and not active[h < -1e-4].any()
        for counts, start, axis in (
            (space.count, space.start, 0), (space.row_count, space.row_start, 1)
        ):  # fmt: skip
            assert torch.equal(counts.long(), active.sum(axis))
            assert torch.equal(start.diff(), active.sum(axis))
        before = active[:128].view(4, 32, features).sum(1).cumsum(0)
        assert torch.equal(space.before[1:].long(), before)


@interpreted
def test_what_does_not_fit_is_refused():
    sae, x = an_sae(), rows_of_x()
    with pytest.raises(ValueError, match="compute_dtype 'half'"):
        CudaSpace(sae, B, "half")
    with pytest.raises(RuntimeError, match="take the dense step"):
        CudaSpace(sae, B, "float32").make_room(sae, 1 << 31)
    with pytest.raises(ValueError, match="a batch of 32 rows, buffers for 33"):
        sparse_gradients(
            sae, Batch.of(x[1:], "none"), penalty=torch.zeros(()), want_l1=False,
            errors=x[1:].clone(), out=Gradients(sae), space=CudaSpace(sae, B, "float32"),
        )  # fmt: skip
    sae.W_enc = torch.nn.Parameter(sae.W_enc.contiguous(), requires_grad=False)
    with pytest.raises(ValueError, match="a row per feature in memory"):
        step(sae, x)


def bits(out, errors):
    return b"".join(t.cpu().numpy().tobytes() for t in (*out.tensors(), errors))


def rates(lr, t):
    return torch.tensor(adam_rates(lr, 0.9, 0.999, t), device=DEVICE)


def adam_by_the_book(p, m, v, grads, *, lr, t, unit, clip):
    """One step in float64, as the paper has it."""
    row = p["W_dec"]
    if unit:
        grads = dict(grads, W_dec=grads["W_dec"] - (grads["W_dec"] * row).sum(1)[:, None] * row)
    if clip:
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        grads = {k: g * min(1.0, clip / (norm + 1e-6)) for k, g in grads.items()}
    for k, g in grads.items():
        m[k] = 0.9 * m[k] + 0.1 * g
        v[k] = 0.999 * v[k] + 0.001 * g * g
        p[k] = p[k] - lr * (m[k] / (1 - 0.9**t)) / ((v[k] / (1 - 0.999**t)).sqrt() + 1e-8)
    if unit:
        p["W_dec"] = p["W_dec"] / p["W_dec"].norm(dim=1, keepdim=True)


@interpreted
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adam_agrees_with_the_float64_reference(unit, clip):
    sae, half = an_sae(), None
    if not unit:
        sae.W_dec *= torch.linspace(0.2, 1.7, L, device=DEVICE)[:, None]
    p = {k: getattr(sae, k).detach().double() for k in PARAMETERS}
    m, v = ({k: torch.zeros_like(p[k]) for k in p} for _ in range(2))
    moments = {
        k: (torch.zeros_like(getattr(sae, k)), torch.zeros_like(getattr(sae, k)))
        for k in PARAMETERS
    }
    if unit:
        half = HalfWeights(sae)
        half.refresh(sae)
    grad, generator = Gradients(sae), torch.Generator().manual_seed(0)
    for t in (1, 2):
        for k in PARAMETERS:
            like = getattr(grad, k)
            like.copy_(torch.randn(like.shape, generator=generator))
        grads = {k: getattr(grad, k).double() for k in PARAMETERS}
        adam_by_the_book(p, m, v, grads, lr=1e-2, t=t, unit=unit, clip=clip)
        fused_adam_rows(
            sae, grad, moments, rates(1e-2, t), beta1=0.9, beta2=0.999, unit=unit,
            gradient_clip=clip, half=half,
        )  # fmt: skip
    for k in PARAMETERS:
        torch.testing.assert_close(getattr(sae, k).double(), p[k], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments[k][0].double(), m[k], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments[k][1].double(), v[k], rtol=1e-5, atol=1e-8)
    if half is not None:
        # To 2^-8: a GPU rounds to the nearest, the interpreter cuts off.
        torch.testing.assert_close(half.W_dec.float(), sae.W_dec, rtol=2**-7, atol=0)
        torch.testing.assert_close(half.W_enc.float(), sae.W_enc.t(), rtol=2**-7, atol=0)


@interpreted
def test_half_weights_follow_what_torch_does_to_the_weights():
    sae = an_sae()
    half = HalfWeights(sae)
    half.refresh(sae)
    with torch.no_grad():
        sae.W_enc[:, EVERYWHERE].neg_()
    half.refresh(sae)
    assert torch.equal(half.W_enc, sae.W_enc.t().bfloat16())
    # Adam in Triton writes its own copy of the weights. Without half, the copy must be known old.
    moments = {k: (torch.zeros_like(p), torch.zeros_like(p)) for k, p in sae.named_parameters()}
    grad = Gradients(sae)
    for tensor in grad.tensors():
        tensor.fill_(1.0)
    assert grad.valid.all()
    fused_adam_rows(sae, grad, moments, rates(0.1, 1), beta1=0.9, beta2=0.999, unit=False)
    half.refresh(sae)
    assert torch.equal(half.W_dec, sae.W_dec.bfloat16())
