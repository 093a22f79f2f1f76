"""Which features might be active in a row: the encoder's product in whole numbers of eight bits.

A CPU multiplies those several times as fast as floating-point numbers. What the product says is off
by no more than a bound that is known for each row and feature, so whatever lies further below its
floor than that is not active for certain; of the rest, a little more than are, pre-activations are
computed in full precision. Which entries are active, and their values, do not depend on any of it.

A row x is s q + δ with q whole numbers from -127 to 127, a feature's weights w are t p + ε:

    |⟨x, w⟩ - s t ⟨q, p⟩|  ≤  ‖s q‖ ‖ε‖ + ‖δ‖ ‖w‖                    (Cauchy-Schwarz)

Dimensions are first brought to one size, x_d / m_d and w_d m_d with m_d a power of two, which is
exact: a few dimensions of a residual stream are far larger than the others, and s would be theirs.
Rounding in floating point, of the value itself and of the bound, is in the bound.

B rows, D = d_in, L = d_sae.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.gradients import RunLanes, block_rows

AT_ONCE = 512
SAMPLE = 256  # features whose weights tell how large each dimension's are


@functools.cache
def has_fast_int8() -> bool:
    """Whether this CPU has instructions for products in eight bits, and this PyTorch uses them."""
    try:
        return bool(torch.cpu._is_vnni_supported()) and torch.backends.mkldnn.is_available()
    except AttributeError:  # an older PyTorch
        return False


def cuts(n: int) -> list[tuple[int, int]]:
    """From, to: what a thread takes at once of n rows or features that are independent."""
    return [(a, min(a + AT_ONCE, n)) for a in range(0, n, AT_ONCE)]


class Quantized:
    """Rows [N, D] as whole numbers times a step of each row's, and what they are off by."""

    def __init__(self, n_rows: int, d_in: int, dtype: torch.dtype) -> None:
        self.whole = torch.zeros(n_rows, d_in, dtype=torch.int8)
        self.step = torch.ones(n_rows, dtype=dtype)
        # In units of the step: of the whole numbers, of what is left over, of the row.
        self.norm_whole = torch.zeros(n_rows, dtype=dtype)
        self.norm_left = torch.zeros(n_rows, dtype=dtype)
        self.norm = torch.zeros(n_rows, dtype=dtype)

    def set(self, rows: Tensor, factor: Tensor, run: RunLanes) -> None:
        """rows [N, D], each dimension times factor [D]."""
        from saeray.sae.numba_screening import quantize_rows

        def some(task: tuple[int, int]) -> None:
            quantize_rows(
                *task, rows.numpy(), factor.numpy(), self.whole.numpy(), self.step.numpy(),
                self.norm_whole.numpy(), self.norm_left.numpy(), self.norm.numpy(),
            )  # fmt: skip

        for _ in run(some, cuts(len(rows))):
            pass


class Screen:
    """Of one SAE and one batch: products of rows and features, and the bound on each.

    With u, a, g [B] of a row and residual, norm [L] of a feature, in units of the product:

        |⟨x, w⟩ u / t - product| ≤ a residual + g norm
    """

    def __init__(self, sae: SAE, n_rows: int, *, int8: bool | None = None) -> None:
        """int8: instead of products in the SAE's own dtype; None: where that is faster."""
        self.int8 = has_fast_int8() if int8 is None else int8
        dtype = sae.W_enc.dtype
        # Of sums of D products in the SAE's dtype, relative to the product of the norms.
        self.rounding = (sae.d_in + 8) * torch.finfo(dtype).eps
        self.inflated = 1 + 3 * self.rounding  # of norms, which are such sums themselves
        self.product_dtype = torch.int32 if self.int8 else dtype
        self.block_rows = min(block_rows(sae, self.product_dtype.itemsize), n_rows)
        if self.int8:
            self.x = Quantized(n_rows, sae.d_in, dtype)
            self.w = Quantized(sae.d_sae, sae.d_in, dtype)

    def set(self, sae: SAE, x_centred: Tensor, run: RunLanes) -> Screen:
        """For this batch [B, D], and the SAE's weights as they are now."""
        weights = sae.W_enc.detach().t()
        if self.int8:
            factor = sizes(x_centred, weights)
            self.x.set(x_centred, 1 / factor, map)
            self.w.set(weights, factor, run)
            self.t = self.w.step
            self.u = 1 / self.x.step
            self.a = self.x.norm_whole * self.inflated
            self.g = (self.x.norm_left + self.rounding * self.x.norm) * self.inflated
            self.residual, self.norm = self.w.norm_left, self.w.norm
        else:
            self.x_centred, self.W_enc = x_centred, sae.W_enc.detach()
            self.t = torch.ones_like(sae.b_enc)
            self.u = x_centred.new_ones(len(x_centred))
            self.a = torch.zeros_like(self.u)
            self.g = self.inflated * self.rounding * 2 * x_centred.norm(dim=1)
            self.residual, self.norm = torch.zeros_like(self.t), weights.norm(dim=1)
        return self

    def product(self, rows: slice, out: Tensor) -> None:
        """⟨q, p⟩ of some rows and all features into out [R, L] of `product_dtype`."""
        if self.int8:
            torch._int_mm(self.x.whole[rows], self.w.whole.t(), out=out)
        else:
            torch.mm(self.x_centred[rows], self.W_enc, out=out)

    def slack(self, *biases: Tensor) -> Tensor:
        """What adding these [L] to a product may round away, in the product's units."""
        return sum((b.abs() for b in biases), torch.zeros_like(self.t)) * self.rounding / self.t


def sizes(x: Tensor, weights: Tensor) -> Tensor:
    """[D] powers of two: what makes a dimension of x / m and weights * m equally large."""
    of_x = x.square().mean(dim=0).sqrt()
    some = weights[:: max(1, len(weights) // SAMPLE)]
    of_w = some.square().mean(dim=0).sqrt()
    m = torch.exp2(torch.log2(of_x / of_w).mul(0.5).round())
    return torch.where((m > 1e-6) & (m < 1e6), m, 1.0)  # neither of nothing nor of NaN
