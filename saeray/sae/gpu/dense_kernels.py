"""Triton kernels of the dense step: what lies between its products, in place, with sums by feature.

Sums over rows are made in chunks of rows, each by one program, and added in their order by the
caller: no atomics, so the same bits in every run.  B rows, L = d_sae, C = B / CHUNK chunks.
"""

import triton
import triton.language as tl


@triton.jit
def relu_in_place(h, bias, part_f, part_fired, B, L,
                  CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                  BIASED: tl.constexpr):  # fmt: skip
    """h [B, L] becomes f = relu(h + bias); part_f, part_fired [C, L] of each chunk of rows.

    BIASED: bias [L] is what the product, whose bias was rounded, still lacks.
    """
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    known = col < L
    first = tl.program_id(1) * CHUNK
    rest = tl.zeros([COLS], tl.float32)
    if BIASED:
        b = tl.load(bias + col, mask=known, other=0)
        rest = b - b.to(h.dtype.element_ty).to(tl.float32)
    sum_f = tl.zeros([ROWS, COLS], tl.float32)
    fired = tl.zeros([ROWS, COLS], tl.float32)
    for r in range(0, CHUNK, ROWS):
        row = first + r + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * L + col[None, :]
        inside = (row < B)[:, None] & known[None, :]
        value = tl.load(h + at, mask=inside, other=0).to(tl.float32)
        value = tl.where(inside, tl.maximum(value + rest[None, :], 0.0), 0.0)
        # As it is stored, so that an entry counts as active that has a value later on.
        value = value.to(h.dtype.element_ty)
        tl.store(h + at, value, mask=inside)
        sum_f += value.to(tl.float32)
        fired += (value > 0).to(tl.float32)
    out = tl.program_id(1).to(tl.int64) * L + col
    tl.store(part_f + out, tl.sum(sum_f, axis=0), mask=known)
    tl.store(part_fired + out, tl.sum(fired, axis=0), mask=known)


@triton.jit
def pull_back_in_place(df, f, penalty, part_dh, B, L,
                       CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                       WEIGHTED: tl.constexpr):  # fmt: skip
    """df [B, L] becomes dh = (df + penalty) (f > 0); part_dh [C, L] of each chunk of rows.

    penalty: of every feature, or [L].
    """
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    known = col < L
    first = tl.program_id(1) * CHUNK
    cost = tl.zeros([COLS], tl.float32)
    if WEIGHTED:
        cost = tl.load(penalty + col, mask=known, other=0)
    else:
        cost += tl.load(penalty)
    sum_dh = tl.zeros([ROWS, COLS], tl.float32)
    for r in range(0, CHUNK, ROWS):
        row = first + r + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * L + col[None, :]
        inside = (row < B)[:, None] & known[None, :]
        active = tl.load(f + at, mask=inside, other=0).to(tl.float32) > 0
        dh = tl.load(df + at, mask=inside, other=0).to(tl.float32) + cost[None, :]
        dh = tl.where(active, dh, 0.0)
        tl.store(df + at, dh, mask=inside)
        sum_dh += dh
    out = tl.program_id(1).to(tl.int64) * L + col
    tl.store(part_dh + out, tl.sum(sum_dh, axis=0), mask=known)
