"""The dense step on a GPU: five products, and one pass over [B, L] before and after the middle one.

    h = (x - b_dec) W_enc + b_enc ─► f = relu(h), Σ f, counts     in place
    x̂ = f W_dec + b_dec, errors, dx̂      dW_dec = fᵀ dx̂      df = dx̂ W_decᵀ
    dh = (df + penalty) (f > 0), Σ dh     in place      dW_enc = (x - b_dec)ᵀ dh

What `sparse_step` does while many features are active. [B, L] is kept in the compute dtype, twice;
weights, biases, sums over rows and the weights' gradients are float32.

Uses Triton, and imports it only when something is computed. B rows, D = d_in, L = d_sae.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.gpu.adam import HalfWeights, rows_of, run
from saeray.sae.gpu.sparse_step import LOW, product_precision, sum_l1
from saeray.sae.gradients import Batch, Gradients

CHUNK_ROWS = 128  # of one partial sum: it decides how sums are made
RELU_TILE = dict(CHUNK=CHUNK_ROWS, ROWS=4, COLS=512, num_warps=4)
PULL_BACK_TILE = dict(CHUNK=CHUNK_ROWS, ROWS=16, COLS=128, num_warps=4)
# torch >= 2.8 can keep what tensor cores sum in float32; before, it comes rounded.
EXACT_SUMS = "dtype_out" in torch.ops.aten.mm.overloads()


class DenseSpace:
    """Buffers of a dense step on B rows. One for all SAEs of a shape, as `CudaSpace`."""

    def __init__(self, sae: SAE, n_rows: int, compute_dtype: str) -> None:
        self.compute_dtype, low = compute_dtype, LOW[compute_dtype]
        D, L, device = sae.d_in, sae.d_sae, sae.W_enc.device
        self.n_chunks = -(-n_rows // CHUNK_ROWS)
        self.f = torch.empty(n_rows, L, dtype=low, device=device)
        self.dh = torch.empty(n_rows, L, dtype=low, device=device)
        self.x_centred = torch.empty(n_rows, D, dtype=low, device=device)
        self.dx_hat = torch.empty(n_rows, D, dtype=low, device=device)
        self.parts = torch.empty(3, self.n_chunks, L, device=device)
        self.half: HalfWeights | None = None  # where the trainer has none


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b into out, float32, summed in float32 whatever a and b are."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif EXACT_SUMS and a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.copy_(torch.mm(a, b))


def dense_gradients(
    sae: SAE,
    batch: Batch,
    *,
    penalty: Tensor,
    want_l1: bool,
    errors: Tensor,
    out: Gradients,
    space: DenseSpace,
    half: HalfWeights | None = None,
) -> None:
    """As `sparse_step.sparse_gradients`, and with its arguments."""
    from saeray.sae.gpu import dense_kernels as kernels

    (B, L), s = space.f.shape, space
    W_enc, W_dec = rows_of(sae.W_enc), sae.W_dec.data
    low = s.f.dtype != torch.float32
    if low:
        if half is None:
            half = s.half = s.half or HalfWeights(sae)
            half.versions = None  # whose they are is not known
        half.refresh(sae)
        W_enc, W_dec = half.W_enc, half.W_dec

    def grid(tile: dict[str, int]) -> tuple[int, int]:
        return (-(-L // tile["COLS"]), s.n_chunks)

    sums_f, sums_fired, sums_dh = s.parts
    with torch.cuda.device_of(batch.x), product_precision(s.compute_dtype):
        torch.sub(batch.x, sae.b_dec, out=errors)
        s.x_centred.copy_(errors)
        # A bias that is large cancels most of the product. So it is in the sum that is rounded, as
        # far as bfloat16 holds it, and the rest of it is added in full precision.
        torch.addmm(sae.b_enc.to(s.f.dtype), s.x_centred, W_enc.t(), out=s.f)
        run(
            kernels.relu_in_place, grid(RELU_TILE),
            s.f, sae.b_enc, sums_f, sums_fired, B, L, BIASED=low, **RELU_TILE,
        )  # fmt: skip
        torch.sum(sums_f, dim=0, out=out.f)
        torch.sum(sums_fired, dim=0, out=out.fired)
        product(s.f, W_dec, errors)
        errors.add_(sae.b_dec).sub_(batch.x)
        dx_hat = errors * batch.scale
        torch.sum(dx_hat, dim=0, out=out.b_dec)
        s.dx_hat.copy_(dx_hat)
        product(s.f.t(), s.dx_hat, out.W_dec)
        torch.mm(s.dx_hat, W_dec.t(), out=s.dh)
        run(
            kernels.pull_back_in_place, grid(PULL_BACK_TILE),
            s.dh, s.f, penalty, sums_dh, B, L, WEIGHTED=penalty.dim() == 1, **PULL_BACK_TILE,
        )  # fmt: skip
        torch.sum(sums_dh, dim=0, out=out.b_enc)
        product(s.dh.t(), s.x_centred, rows_of(out.W_enc))
        out.valid.fill_(1)
        sum_l1(out, want_l1 and penalty.dim() == 0)
