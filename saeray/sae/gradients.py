"""Value and gradient of the SAE loss in closed form, in blocks of rows that stay in cache.

Autograd would keep [B, L] tensors of the whole batch alive and walk them several times. Here a
batch is cut into *lanes* of a fixed number of rows and a lane into *blocks*; a block's [R, L]
activations live in two buffers that are used over and over. With e = x̂ - x and n the row's
normaliser:

    dx̂    = 2 e / (n B D)                       [B, D]   (times D where the squared error is summed)
    dW_dec = fᵀ dx̂                               [L, D]
    dh     = (dx̂ W_decᵀ + l1_coefficient / B) · (f > 0)   [B, L]
    dW_enc = (x - b_dec)ᵀ dh                      [D, L]
    db_enc = Σ_B dh        db_dec = Σ_B dx̂ - (Σ_B dh) W_encᵀ

Where the decoder is free, l1_coefficient is multiplied by the norm n_j of a feature's row, which
has a gradient of its own: dW_dec[j] += l1_coefficient / B · (Σ_B f_j) W_dec[j] / n_j.

With compute_dtype bfloat16 the factors of these products, and what they come to, are rounded to
bfloat16; weights, sums over blocks and everything elementwise stay as they are.

A lane is a sum of its own, and the lanes of a batch are added in their order. So the result does
not depend on how many threads computed the lanes or which came first: the same bits on one core
and on sixteen.  B rows, R rows of a block, D = d_in, L = d_sae.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeray.sae.losses import EPSILON, mse_normaliser, mse_weight
from saeray.sae.ranks import Ranks
from saeray.sae.standard import StandardSAE

# Part of what a run is a function of: changing one changes results in their last bits.
LANE_ROWS = 1024
BLOCK_BYTES = 1 << 21  # of one [R, L] buffer; measured best from d_sae 1024 to 4096
CACHED_BYTES = 1 << 24  # of one weight

Lane = tuple[int, int]  # rows from, to
RunLanes = Callable[[Callable[[Lane], Any], Iterable[Lane]], Iterator[Any]]  # `map`, or a pool's


def lanes_of(n_rows: int, device: torch.device, n_ranks: int = 1) -> list[Lane]:
    """The fixed cuts of a batch. A GPU takes its whole share at once."""
    step = min(LANE_ROWS if device.type == "cpu" else n_rows, -(-n_rows // n_ranks))
    return [(a, min(a + step, n_rows)) for a in range(0, n_rows, step)]


def block_rows(sae: StandardSAE, itemsize: int) -> int:
    """Rows of a block, a power of two from 64 to 512: their hidden activations fill BLOCK_BYTES.

    At least 256 where the weights don't stay in cache: every block reads them all from memory.
    """
    if sae.W_enc.device.type != "cpu":
        return 1 << 30
    rows = max(1, BLOCK_BYTES // (sae.d_sae * itemsize))
    least = 256 if sae.W_enc.numel() * itemsize > CACHED_BYTES else 64
    return min(512, max(least, 1 << (rows.bit_length() - 1)))


class Gradients:
    """A sum over rows of the gradient of one SAE, and what is counted on the way."""

    def __init__(self, sae: StandardSAE) -> None:
        self.W_enc = torch.empty_like(sae.W_enc)
        self.W_dec = torch.empty_like(sae.W_dec)
        self.b_enc = torch.empty_like(sae.b_enc)  # Σ dh
        self.b_dec = torch.empty_like(sae.b_dec)  # Σ dx̂; the encoder's share is added at the end
        # Rows each feature fired on: whole numbers, exact in float32 up to 16 million rows.
        self.fired = torch.empty(sae.d_sae, dtype=torch.float32, device=sae.W_enc.device)
        self.l1 = torch.empty((), dtype=sae.W_enc.dtype, device=sae.W_enc.device)  # Σ f
        self.f = torch.empty_like(sae.b_enc)  # Σ f of each feature, where the decoder is free

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, contiguous."""
        return (self.W_enc.t(), self.W_dec, self.b_enc, self.b_dec, self.fired, self.l1, self.f)

    def zero_(self) -> None:
        for mine in self.tensors():
            mine.zero_()

    def add_weighted_l1_(self, W_dec: Tensor, norms: Tensor, per_row: float) -> None:
        """What the norms' own gradient adds to W_dec, and Σ f n; norms [L] of its rows."""
        along = (self.f * per_row) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        self.W_dec.addcmul_(along.unsqueeze(1), W_dec)
        self.l1.copy_(self.f @ norms)

    def add_(self, other: Gradients) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.add_(theirs)


class Workspace:
    """The buffers one thread needs for a block: two [R, L] and two [R, D]."""

    def __init__(self, sae: StandardSAE, n_rows: int) -> None:
        rows = min(n_rows, block_rows(sae, sae.W_enc.element_size()))
        self.rows = rows
        self.f = sae.W_dec.new_empty(rows, sae.d_sae)
        self.dh = sae.W_dec.new_empty(rows, sae.d_sae)
        self.x_centred = sae.W_dec.new_empty(rows, sae.d_in)
        self.dx_hat = sae.W_dec.new_empty(rows, sae.d_in)


class Factor:
    """One side of a product: what it is made of, or a copy of that in bfloat16."""

    def __init__(self, like: Tensor, bfloat16: bool) -> None:
        self.copy = torch.empty_like(like, dtype=torch.bfloat16) if bfloat16 else None

    def of(self, exact: Tensor) -> Tensor:
        return exact if self.copy is None else self.copy.copy_(exact)


class Factors:
    """The weights of one step as its products take them."""

    def __init__(self, sae: StandardSAE, bfloat16: bool) -> None:
        self.bfloat16 = bfloat16
        self.encoder, self.decoder = Factor(sae.W_enc, bfloat16), Factor(sae.W_dec, bfloat16)

    def of(self, sae: StandardSAE) -> Factors:
        self.W_enc, self.W_dec = self.encoder.of(sae.W_enc), self.decoder.of(sae.W_dec)
        return self

    def product(self, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """a b + bias into `out`, which is float32 or wider whatever the product is made in."""
        if self.bfloat16 and bias is not None:
            # A bias that is large cancels most of the product. So it is in the sum that is rounded,
            # as far as bfloat16 holds it, and the rest of it is added in full precision.
            coarse = bias.bfloat16()
            out.copy_(torch.addmm(coarse, a.bfloat16(), b.bfloat16()))
            out.add_(bias - coarse)
        elif self.bfloat16:
            out.copy_(torch.mm(a.bfloat16(), b.bfloat16()))
        elif bias is None:
            torch.mm(a, b, out=out)
        else:
            torch.addmm(bias, a, b, out=out)

    def add_product(self, a: Tensor, b: Tensor, total: Tensor, first: bool) -> None:
        """total += a b; the first one overwrites whatever the buffer held."""
        if not self.bfloat16:
            torch.addmm(total, a, b, beta=0.0 if first else 1.0, out=total)
        elif first:
            total.copy_(torch.mm(a.bfloat16(), b.bfloat16()))
        else:
            total.add_(torch.mm(a.bfloat16(), b.bfloat16()))


class Batch(NamedTuple):
    """What all SAEs of a pack share of one batch."""

    x: Tensor  # [B, D] in the SAE's dtype
    normaliser: Tensor  # [B, 1] of the squared error
    scale: Tensor  # [B, 1] 2 weight / (normaliser B D): dx̂ = scale * (x̂ - x)
    weight: int  # `mse_weight`

    @classmethod
    def of(cls, x: Tensor, normalization: str) -> Batch:
        normaliser = mse_normaliser(x, normalization)
        weight = mse_weight(x.shape[1], normalization)
        return cls(x, normaliser, (2.0 * weight / x.numel()) / normaliser, weight)


def lane_gradients(
    sae: StandardSAE,
    batch: Batch,
    lane: Lane,
    *,
    penalty: float | Tensor,
    weighted: bool,
    errors: Tensor,
    out: Gradients,
    space: Workspace,
    factors: Factors,
    want_l1: bool,
) -> None:
    """Writes one lane's gradient into `out` and its x̂ - x into the lane's rows of errors [B, D].

    penalty: of an active feature in one row, as it enters the gradient; [L] where it is weighted.
    """
    for counted in (out.b_enc, out.b_dec, out.fired, out.l1, out.f):
        counted.zero_()
    for a in range(*lane, space.rows):
        b = min(a + space.rows, lane[1])
        n = b - a
        f, dh = space.f[:n], space.dh[:n]
        x_centred, dx_hat = space.x_centred[:n], space.dx_hat[:n]
        error = errors[a:b]

        torch.sub(batch.x[a:b], sae.b_dec, out=x_centred)
        factors.product(x_centred, factors.W_enc, sae.b_enc, f)
        f.clamp_min_(0)
        factors.product(f, factors.W_dec, sae.b_dec, error)
        error.sub_(batch.x[a:b])
        torch.mul(error, batch.scale[a:b], out=dx_hat)

        factors.product(dx_hat, factors.W_dec.t(), None, dh)
        dh.add_(penalty)
        torch.ops.aten.threshold_backward.grad_input(dh, f, 0, grad_input=dh)
        first = a == lane[0]
        factors.add_product(f.t(), dx_hat, out.W_dec, first)
        factors.add_product(dh.t(), x_centred, out.W_enc.t(), first)
        out.b_enc.add_(dh.sum(dim=0))
        out.b_dec.add_(dx_hat.sum(dim=0))
        if weighted:
            out.f.add_(f.sum(dim=0))
        elif want_l1:
            out.l1.add_(f.sum())
        out.fired.add_(f.sign_().sum(dim=0, dtype=torch.float32))  # f is not needed any more


def ghost_gradients(
    sae: StandardSAE,
    batch: Batch,
    errors: Tensor,
    dead: Tensor,
    normalization: str,
    grad: Gradients,
    run_lanes: RunLanes,
    ranks: Ranks,
) -> Tensor:
    """Adds the ghost term's gradient for the dead features (indices, [n]); returns its value.

    With r = x - x̂, E = exp(h[:, dead]) (divided by the row's largest one, which s cancels), s the
    row's scale to half of ‖r‖ and c the elementwise rescaling to the squared error (both
    constants), g = s E W_dec[dead]:

        dg = 2 c (g - r) / (n_r B D) · s       dW_dec[dead] = Eᵀ dg
        dh = (dg W_dec[dead]ᵀ) · E             dW_enc[:, dead] = (x - b_dec)ᵀ dh, and so on
    """
    W_enc, W_dec, b_enc = sae.W_enc.t()[dead], sae.W_dec[dead], sae.b_enc[dead]
    normaliser = mse_normaliser(errors, normalization)  # of r = -errors: the same norm
    per_element = batch.weight / errors.numel()

    def lane_ghost(lane: Lane) -> tuple[Tensor, ...]:
        rows = slice(*lane)
        residual, x_centred = -errors[rows], batch.x[rows] - sae.b_dec
        h = torch.addmm(b_enc, x_centred, W_enc.t())  # [rows, dead]
        highest = h.amax(dim=1, keepdim=True).clamp_min_(0)
        E = h.sub_(highest).exp_()
        g = E @ W_dec
        scale = torch.linalg.vector_norm(residual, dim=1, keepdim=True) / (
            EPSILON * highest.neg_().exp_() + 2 * torch.linalg.vector_norm(g, dim=1, keepdim=True)
        )
        difference = g.mul_(scale).sub_(residual)
        gm = difference.square() / normaliser[rows]
        c = residual.square().div_(batch.normaliser[rows]).div_(gm + EPSILON)
        value = torch.mul(c, gm).sum() * per_element
        dg = difference.mul_(c).mul_((2 * per_element) * scale / normaliser[rows])
        dW_dec = E.t() @ dg
        dh = torch.mm(dg, W_dec.t()).mul_(E)
        return dh.t() @ x_centred, dW_dec, dh.sum(dim=0), value

    total = (
        torch.zeros_like(W_enc),
        torch.zeros_like(W_dec),
        torch.zeros_like(b_enc),
        errors.new_zeros(()),
    )
    lanes = ranks.own(lanes_of(len(errors), errors.device, ranks.size))
    for i, part in enumerate(run_lanes(lane_ghost, lanes)):
        for t, p in zip(total, part, strict=True):
            t.copy_(p) if i == 0 else t.add_(p)
    ranks.sum_(total)
    dW_enc, dW_dec, db_enc, value = total
    grad.W_enc.t().index_add_(0, dead, dW_enc)
    grad.W_dec.index_add_(0, dead, dW_dec)
    grad.b_enc.index_add_(0, dead, db_enc)
    return value
