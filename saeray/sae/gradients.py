"""Value and gradient of the SAE loss in closed form, in blocks of rows that stay in cache.

Autograd would keep [B, L] tensors of the whole batch alive and walk them several times. Here a
batch is cut into *lanes* of a fixed number of rows and a lane into *blocks*; a block's [R, L]
activations live in two buffers that are used over and over. With e = x̂ - x and n the row's
normaliser (of a transcoder e = ŷ - y, and so on; see the end):

    dx̂    = 2 e / (n B D)                       [B, D]   (times D where the squared error is summed)
    dW_dec = fᵀ dx̂                               [L, D]
    dh     = (dx̂ W_decᵀ + l1_coefficient / B) · (f > 0)   [B, L]
    dW_enc = (x - b_dec)ᵀ dh                      [D, L]
    db_enc = Σ_B dh        db_dec = Σ_B dx̂ - (Σ_B dh) W_encᵀ

Where the decoder is free, l1_coefficient is multiplied by the norm n_j of a feature's row, which
has a gradient of its own: dW_dec[j] += l1_coefficient / B · (Σ_B f_j) W_dec[j] / n_j.

A transcoder's errors are those of f W_dec + b_dec_out against y - x W_skip, so its skip connection
is two products of B·D·O, whatever L is: dW_skip = xᵀ dx̂, db_dec_out = Σ_B dx̂.

With compute_dtype bfloat16 the factors of these products, and what they come to, are rounded to
bfloat16; weights, sums over blocks and everything elementwise stay as they are.

A lane is a sum of its own, and the lanes of a batch are added in their order. So the result does
not depend on how many threads computed the lanes or which came first: the same bits on one core
and on sixteen.  B rows, R rows of a block, D = d_in, L = d_sae, O = d_out (D but in a transcoder).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saeray.sae.architectures.base import SAE
from saeray.sae.architectures.rule import Active, Rule, whole
from saeray.sae.losses import mse_normaliser, mse_weight

# Part of what a run is a function of: changing one changes results in their last bits.
LANE_ROWS = 1024
BLOCK_BYTES = 1 << 21  # of one [R, L] buffer; measured best from d_sae 1024 to 4096
CACHED_BYTES = 1 << 24  # of one weight

Lane = tuple[int, int]  # rows from, to
RunLanes = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]  # `map`, or a pool's


def lanes_of(n_rows: int, device: torch.device, n_ranks: int = 1) -> list[Lane]:
    """The fixed cuts of a batch. A GPU takes its whole share at once."""
    step = min(LANE_ROWS if device.type == "cpu" else n_rows, -(-n_rows // n_ranks))
    return [(a, min(a + step, n_rows)) for a in range(0, n_rows, step)]


def block_rows(sae: SAE, itemsize: int) -> int:
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

    def __init__(self, sae: SAE, sums: Iterable[str] = ()) -> None:
        """sums: what else is summed over rows for each feature, by name (`Rule.SUMS`)."""
        self.W_enc = torch.empty_like(sae.W_enc)
        self.W_dec = torch.empty_like(sae.W_dec)
        self.b_enc = torch.empty_like(sae.b_enc)  # Σ dh
        self.b_dec = torch.empty_like(sae.b_dec)  # Σ dx̂; the encoder's share is added at the end
        # A transcoder's Σ dx̂ are here, and only the encoder's share is in b_dec.
        self.b_dec_out = None if sae.b_dec_out is None else torch.empty_like(sae.b_dec_out)
        self.W_skip = None if sae.W_skip is None else torch.empty_like(sae.W_skip)
        # Rows each feature fired on: whole numbers, exact in float32 up to 16 million rows.
        self.fired = torch.empty(sae.d_sae, dtype=torch.float32, device=sae.W_enc.device)
        # Of the sparsity term, without its coefficient: for an L1, Σ f.
        self.l1 = torch.empty((), dtype=sae.W_enc.dtype, device=sae.W_enc.device)
        self.f = torch.empty_like(sae.b_enc)  # Σ f of each feature, where the decoder is free
        # What else is in the loss: the squared errors of inner widths, or of the gate's.
        self.inner = torch.empty_like(self.l1)
        self.extra = {name: torch.empty_like(sae.b_enc) for name in sums}
        # [1], on a GPU: 0 where the lists of entries had no room, and all of this is to be made
        # again. (The CPU knows before it goes on.)
        self.valid = torch.ones(1, dtype=torch.int32, device=sae.W_enc.device)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, contiguous."""
        return (
            self.W_enc.t(), self.W_dec, self.b_enc, self.b_dec, self.fired, self.l1, self.f,
            self.inner, *self.extra.values(),
            *(t for t in (self.b_dec_out, self.W_skip) if t is not None),
        )  # fmt: skip

    @property
    def b_out(self) -> Tensor:
        """[O]: Σ dx̂."""
        return self.b_dec if self.b_dec_out is None else self.b_dec_out

    def zero_(self) -> None:
        for mine in self.tensors():
            mine.zero_()

    def add_weighted_l1_(self, W_dec: Tensor, norms: Tensor, per_row: float | Tensor) -> None:
        """What the norms' own gradient adds to W_dec, and Σ f n; norms [L] of its rows."""
        along = (self.f * per_row) / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        self.W_dec.addcmul_(along.unsqueeze(1), W_dec)
        self.l1.copy_(self.f @ norms)

    def add_(self, other: Gradients) -> None:
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.add_(theirs)


class Workspace:
    """The buffers one thread needs for a block: two or three [R, L], some [R, D]."""

    def __init__(self, sae: SAE, rule: Rule, n_rows: int) -> None:
        rows = min(n_rows, block_rows(sae, sae.W_enc.element_size()))
        self.rows = rows
        self.f = sae.W_dec.new_empty(rows, sae.d_sae)
        self.h = torch.empty_like(self.f) if rule.keeps_h else self.f
        self.dh = sae.W_dec.new_empty(rows, sae.d_sae)
        self.x_centred = sae.W_dec.new_empty(rows, sae.d_in)
        self.dx_hat = sae.W_dec.new_empty(len(rule.widths), rows, sae.d_out)


class Factor:
    """One side of a product: what it is made of, or a copy of that in bfloat16."""

    def __init__(self, like: Tensor, bfloat16: bool) -> None:
        self.copy = torch.empty_like(like, dtype=torch.bfloat16) if bfloat16 else None

    def of(self, exact: Tensor) -> Tensor:
        return exact if self.copy is None else self.copy.copy_(exact)


class Factors:
    """The weights of one step as its products take them."""

    def __init__(self, sae: SAE, bfloat16: bool) -> None:
        self.bfloat16 = bfloat16
        self.encoder, self.decoder = Factor(sae.W_enc, bfloat16), Factor(sae.W_dec, bfloat16)

    def of(self, sae: SAE) -> Factors:
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
    y: Tensor  # [B, O], what is to be reconstructed: x itself but in a transcoder
    normaliser: Tensor  # [B, 1] of the squared error
    scale: Tensor  # [B, 1] 2 weight / (normaliser B O): dx̂ = scale * (x̂ - y)
    weight: int  # `mse_weight`

    @classmethod
    def of(cls, x: Tensor, normalization: str, y: Tensor | None = None) -> Batch:
        """y: of a transcoder."""
        y = x if y is None else y
        normaliser = mse_normaliser(y, normalization)
        weight = mse_weight(y.shape[1], normalization)
        return cls(x, y, normaliser, (2.0 * weight / y.numel()) / normaliser, weight)


def lane_gradients(
    sae: SAE,
    rule: Rule,
    batch: Batch,
    lane: Lane,
    *,
    errors: Tensor,
    out: Gradients,
    space: Workspace,
    factors: Factors,
    want_l1: bool,
) -> None:
    """Writes one lane's gradient into `out` and its x̂ - y into the lane's rows of errors [B, O]."""
    for counted in (out.b_enc, out.b_dec, out.fired, out.l1, out.f, out.inner, *out.extra.values()):
        counted.zero_()
    out.b_out.zero_()
    levels = levels_of(rule)
    for a in range(*lane, space.rows):
        b = min(a + space.rows, lane[1])
        n = b - a
        h, f, dh = space.h[:n], space.f[:n], space.dh[:n]
        x_centred, dx_hat = space.x_centred[:n], space.dx_hat[:, :n]
        error, scale = errors[a:b], batch.scale[a:b]
        first = a == lane[0]

        torch.sub(batch.x[a:b], sae.b_dec, out=x_centred)
        factors.product(x_centred, factors.W_enc, sae.b_enc, h)
        rule.latents_of_block(h, f)
        target = without_skip(sae, batch, slice(a, b), factors)
        decode_levels(sae, levels, f, target, scale, error, dx_hat, factors, out.inner)
        gate = None
        if rule.has_gate:
            gate = gate_gradient(sae, rule, h, target, scale, factors, out.inner)

        for (from_, to), dx in zip(levels, dx_hat, strict=True):
            part = f if len(levels) == 1 else f[:, from_:to]
            into = dh if len(levels) == 1 else dh[:, from_:to]
            factors.product(dx, factors.W_dec[from_:to].t(), None, into)
            factors.add_product(part.t(), dx, out.W_dec[from_:to], first)
        if gate is not None and rule.gate_teaches_decoder:
            factors.add_product(gate.latents.t(), gate.dx_hat, out.W_dec, False)
            out.b_out.add_(gate.dx_hat.sum(dim=0))
        if out.W_skip is not None:
            factors.add_product(batch.x[a:b].t(), dx_hat[0], out.W_skip, first)
            if gate is not None and rule.gate_teaches_decoder:
                factors.add_product(batch.x[a:b].t(), gate.dx_hat, out.W_skip, False)
        active = Active(h, f, dh, whole, partial(row_l0, f), column, gate and gate.df)
        if want_l1 and rule.penalty is None:
            out.l1.add_(rule.sparsity(active))
        rule.pull_back_block(active, out.extra)
        factors.add_product(dh.t(), x_centred, out.W_enc.t(), first)
        out.b_enc.add_(dh.sum(dim=0))
        out.b_out.add_(dx_hat[0].sum(dim=0))
        if rule.penalty is not None and rule.step.norms is not None:
            out.f.add_(f.sum(dim=0))
        elif rule.penalty is not None and want_l1:
            out.l1.add_(f.sum())
        out.fired.add_(f.sign_().sum(dim=0, dtype=torch.float32))  # f is not needed any more


def without_skip(sae: SAE, batch: Batch, rows: slice, factors: Factors) -> Tensor:
    """y - x W_skip of some rows: what is left for the features and the bias, [R, O]."""
    y = batch.y[rows]
    if sae.W_skip is None:
        return y
    skipped = torch.empty_like(y)
    factors.product(batch.x[rows], sae.W_skip, None, skipped)
    return torch.sub(y, skipped, out=skipped)


def row_l0(f: Tensor) -> Tensor:
    """How many features are active in each row, [R], of a block f [R, L]."""
    return (f != 0).sum(dim=1).to(f.dtype)


def column(rows: Tensor) -> Tensor:
    """What belongs to rows, [R], beside entries [R, L]."""
    return rows.unsqueeze(1)


def levels_of(rule: Rule) -> list[Lane]:
    """Features from, to: those that a width has more than the one before."""
    return list(zip((0, *rule.widths), rule.widths, strict=False))


def decode_levels(
    sae: SAE,
    levels: list[Lane],
    f: Tensor,
    y: Tensor,
    scale: Tensor,
    error: Tensor,
    dx_hat: Tensor,
    factors: Factors,
    inner: Tensor,
) -> None:
    """error = x̂ - y of all features; dx_hat [levels, R, O] of the squared errors of all widths.

    dx_hat[i] is what a feature of level i gets: of every width that it is in. Widths below the last
    add their squared error to `inner`.
    """
    if len(levels) == 1:
        factors.product(f, factors.W_dec, sae.b_out, error)
        error.sub_(y)
        torch.mul(error, scale, out=dx_hat[0])
        return
    torch.sub(sae.b_out, y, out=error)
    part = torch.empty_like(error)
    for i, (from_, to) in enumerate(levels):
        factors.product(f[:, from_:to], factors.W_dec[from_:to], None, part)
        error.add_(part)
        torch.mul(error, scale, out=dx_hat[i])
        if i < len(levels) - 1:
            inner.add_((dx_hat[i] * error).sum() / 2)
    for i in reversed(range(len(levels) - 1)):
        dx_hat[i].add_(dx_hat[i + 1])


class OfGate(NamedTuple):
    """Of the squared error of what the gate's latents alone reconstruct."""

    latents: Tensor  # [R, L]
    dx_hat: Tensor  # [R, O]
    df: Tensor  # [R, L]


def gate_gradient(
    sae: SAE, rule: Rule, h: Tensor, y: Tensor, scale: Tensor, factors: Factors, inner: Tensor
) -> OfGate:
    error, latents = torch.empty_like(y), rule.gate_latents(h)
    factors.product(latents, factors.W_dec, sae.b_out, error)
    error.sub_(y)
    dx_hat = error * scale
    inner.add_((dx_hat * error).sum() / 2)
    df = torch.empty_like(h)
    factors.product(dx_hat, factors.W_dec.t(), None, df)
    return OfGate(latents, dx_hat, df)
