"""Triton kernels of the sparse step: the weights' gradients, and Adam on rows.

One program makes both gradient rows of a feature: it has W_dec[j] at hand, so df = <dx̂, W_dec[j]>
needs nothing but the rows of dx̂ that the gradient of W_dec gathers anyway. A feature with more
than HOT entries is summed in chunks, which are added in their order.  Notation: `entry_kernels`.
"""

import triton
import triton.language as tl

from saeray.sae.gpu.entry_kernels import chunk


@triton.jit
def sums_of_range(feature, first, last, W_dec, dx_hat, x, rows, f, penalty, D,
                  WIDTH: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Over entries first … last: dW_dec[j], dW_enc[j] [WIDTH], Σ dh, Σ f and the count of f > 0."""
    d = tl.arange(0, WIDTH)
    w = tl.load(W_dec + feature * D + d, mask=d < D, other=0)
    dW_dec = tl.zeros([WIDTH], tl.float32)
    dW_enc = tl.zeros([WIDTH], tl.float32)
    sum_dh = tl.zeros([AT_ONCE], tl.float32)
    sum_f = tl.zeros([AT_ONCE], tl.float32)
    n_fired = tl.zeros([AT_ONCE], tl.float32)
    for e in range(first, last, AT_ONCE):
        entry = e + tl.arange(0, AT_ONCE)
        live = entry < last
        row = tl.load(rows + entry, mask=live, other=0).to(tl.int64)
        value = tl.load(f + entry, mask=live, other=0)
        at = row[:, None] * D + d[None, :]
        inside = live[:, None] & (d < D)[None, :]
        dx = tl.load(dx_hat + at, mask=inside, other=0).to(tl.float32)
        x_rows = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        dh = tl.where(value > 0, tl.sum(dx * w[None, :], axis=1) + penalty, 0.0)
        dW_dec += tl.sum(value[:, None] * dx, axis=0)
        dW_enc += tl.sum(dh[:, None] * x_rows, axis=0)
        sum_dh += dh
        sum_f += value
        n_fired += (value > 0).to(tl.float32)
    return dW_dec, dW_enc, tl.sum(sum_dh, 0), tl.sum(sum_f, 0), tl.sum(n_fired, 0)


@triton.jit
def penalty_of(feature, penalty, WEIGHTED: tl.constexpr):
    """penalty: of every feature, or [L]; in the GPU's memory, so that a CUDA graph can read it."""
    if WEIGHTED:
        return tl.load(penalty + feature)
    else:  # noqa: RET505  (Triton compiles one branch only, so it needs the two)
        return tl.load(penalty)


@triton.jit
def sums_of_chunks(W_dec, dx_hat, x, start, chunk_start, chunk_feature, rows, f, penalty,
                   part_rows, part_sums, L, D, capacity, chunk_capacity, n_workers,
                   WEIGHTED: tl.constexpr, HOT: tl.constexpr, WIDTH: tl.constexpr,
                   AT_ONCE: tl.constexpr):  # fmt: skip
    """part_rows [chunks, 2, D] and part_sums [chunks, 3] of the hot features' chunks."""
    d = tl.arange(0, WIDTH)
    n = tl.minimum(tl.load(chunk_start + L), chunk_capacity)
    for i in range(tl.program_id(0), n, n_workers):
        feature, first, last = chunk(i, start, chunk_start, chunk_feature, capacity, HOT)
        cost = penalty_of(feature, penalty, WEIGHTED)
        dW_dec, dW_enc, dh, total, fired = sums_of_range(
            feature, first, last, W_dec, dx_hat, x, rows, f, cost, D, WIDTH, AT_ONCE
        )
        at = part_rows + i * 2 * D + d  # i is int64, as its bound
        tl.store(at, dW_dec, mask=d < D)
        tl.store(at + D, dW_enc, mask=d < D)
        tl.store(part_sums + i * 3, dh)
        tl.store(part_sums + i * 3 + 1, total)
        tl.store(part_sums + i * 3 + 2, fired)


@triton.jit
def gradients(W_dec, dx_hat, x, start, chunk_start, rows, f, penalty, part_rows,
              part_sums, dW_dec_out, dW_enc_out, db_enc_out, f_out, fired_out, D, capacity,
              chunk_capacity, WEIGHTED: tl.constexpr, HOT: tl.constexpr, WIDTH: tl.constexpr,
              AT_ONCE: tl.constexpr):  # fmt: skip
    """Writes everything a feature has: zeros where it has no entry."""
    feature = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    first = tl.load(start + feature)
    last = tl.load(start + feature + 1)
    if last - first <= HOT:
        cost = penalty_of(feature, penalty, WEIGHTED)
        last = tl.minimum(last, capacity)
        dW_dec, dW_enc, dh, total, fired = sums_of_range(
            feature, first, last, W_dec, dx_hat, x, rows, f, cost, D, WIDTH, AT_ONCE
        )
    else:
        dW_dec = tl.zeros([WIDTH], tl.float32)
        dW_enc = tl.zeros([WIDTH], tl.float32)
        dh = 0.0
        total = 0.0
        fired = 0.0
        n = tl.minimum(tl.load(chunk_start + feature + 1), chunk_capacity)
        for i in range(tl.load(chunk_start + feature), n):
            at = part_rows + i * 2 * D + d
            dW_dec += tl.load(at, mask=d < D, other=0)
            dW_enc += tl.load(at + D, mask=d < D, other=0)
            dh += tl.load(part_sums + i * 3)
            total += tl.load(part_sums + i * 3 + 1)
            fired += tl.load(part_sums + i * 3 + 2)
    tl.store(dW_dec_out + feature * D + d, dW_dec, mask=d < D)
    tl.store(dW_enc_out + feature * D + d, dW_enc, mask=d < D)
    tl.store(db_enc_out + feature, dh)
    tl.store(f_out + feature, total)
    tl.store(fired_out + feature, fired)


@triton.jit
def across(gradient, row, UNIT: tl.constexpr):
    """The gradient without its component along the (unit) row."""
    if UNIT:
        gradient -= tl.sum(gradient * row, axis=0) * row
    return gradient


@triton.jit
def square_norms(gradient, weight, out, D, UNIT: tl.constexpr, WIDTH: tl.constexpr):
    """out [rows]: the square of each gradient row's norm, as `adam_rows` will see it."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    g = tl.load(gradient + row * D + d, mask=d < D, other=0)
    if UNIT:
        g = across(g, tl.load(weight + row * D + d, mask=d < D, other=0), UNIT)
    tl.store(out + row, tl.sum(g * g, axis=0))


@triton.jit
def adam_rows(weight, gradient, mean, square, half, scale, rates, go, n, D, rest1, beta2, rest2,
              epsilon, UNIT: tl.constexpr, SCALED: tl.constexpr, HALF: tl.constexpr,
              WIDTH: tl.constexpr):  # fmt: skip
    """Adam on one row [D] of n elements in all; UNIT: of a row that has norm 1 before and after.

    rates [2] = lr / (1 - beta1^t), sqrt(1 - beta2^t); rest = 1 - beta; all rounded once.
    SCALED: the gradient times *scale. HALF: the new row is written to half as well, in its dtype.
    go: where it is 0, nothing is written.
    """
    d = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * D + d
    inside = (d < D) & (at < n)
    step_size = tl.load(rates)
    root = tl.load(rates + 1)
    w = tl.load(weight + at, mask=inside, other=0)
    g = across(tl.load(gradient + at, mask=inside, other=0), w, UNIT)
    if SCALED:
        g *= tl.load(scale)
    m = tl.load(mean + at, mask=inside, other=0)
    v = tl.load(square + at, mask=inside, other=0)
    m += rest1 * (g - m)
    v = beta2 * v + rest2 * g * g
    w -= step_size * (m / (tl.sqrt(v) / root + epsilon))
    if UNIT:
        w /= tl.sqrt(tl.sum(w * w, axis=0))
    inside = inside & (tl.load(go) != 0)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(weight + at, w, mask=inside)
    if HALF:
        tl.store(half + at, w, mask=inside)
