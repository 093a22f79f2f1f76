"""Triton kernels of the sparse step: from pre-activations to active entries, and back to gradients.

The tensor cores only *nominate*: h [R, L] in a low precision says which entries may be active, with
some slack, and is forgotten. What an entry is worth, and so whether it is active, is computed again
from the rows of x and W_enc in float32: f [E], by feature. Entries are kept in two orders:

    by_feature [G, L]   bit r of word (g, j): feature j may be active in row 32 g + r
    by_row     [B, N]   bit c of word (r, n): feature 32 n + c may be active in row r
    start [L + 1], rows [E], f [E]                 entries by feature, rows ascending
    row_start [B + 1], features [E], places [E]    entries by row, features ascending, and where
                                                   each stands in the order by feature

Every place follows from counts of bits, so the order is the same in every run, and no sum is made
with atomics. What a program writes, none other writes. Counts and places in [B, L] are int64;
places of entries are below `capacity` < 2^31, beyond which nothing is written: the caller looks at
start[L] and starts again with more room.

An architecture's rule is `nominates` and `activation`; the rest knows entries and their f alone,
and that an entry that was nominated and has no f > 0 after all has no gradient.
B rows, D = d_in, L = d_sae, G = B / 32 groups of rows, N = L / 32 words, E entries.
"""

import triton
import triton.language as tl


@triton.jit
def nominates(h, bias, slack):
    """ReLU: where an entry may be active; h [R, L] is x W_enc to a relative error of slack."""
    return h + bias > -slack * tl.abs(h)


@triton.jit
def activation(h):
    """ReLU: the feature's value at its pre-activation."""
    return tl.maximum(h, 0.0)


@triton.jit
def popcount(word):
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def lowest_bit(word):
    """Its index, from the exponent of what it is worth; -127 of an empty word."""
    worth = (word ^ (word & (word - 1))).to(tl.float32)
    return (worth.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def load_words(pointers, mask):
    return tl.load(pointers, mask=mask, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def nominate(h, b_enc, slack, by_row, first, last, L, N,
             ROWS: tl.constexpr, WORDS: tl.constexpr):  # fmt: skip
    """h [last - first, L] of the rows from first, without the bias: their words of by_row."""
    row = first + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 32)
    col = n[:, None] * 32 + lane[None, :]
    at = (row - first)[:, None, None].to(tl.int64) * L + col[None, :, :]
    inside = (row < last)[:, None, None] & (col < L)[None, :, :]
    value = tl.load(h + at, mask=inside, other=0).to(tl.float32)
    bias = tl.load(b_enc + col, mask=col < L, other=0)
    active = nominates(value, bias[None, :, :], slack) & inside
    word = tl.sum(active.to(tl.uint32) << lane[None, None, :], axis=2).to(tl.int32, bitcast=True)
    inside_words = (row < last)[:, None] & (n < N)[None, :]
    tl.store(by_row + row[:, None].to(tl.int64) * N + n[None, :], word, mask=inside_words)


@triton.jit
def transpose_bits(by_row, by_feature, B, L, N, WORDS: tl.constexpr):
    """by_feature from by_row: 32 rows and WORDS words of them a program."""
    group = tl.program_id(0)
    n = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 32)
    turned = tl.zeros([WORDS, 32], tl.uint32)
    for r in tl.static_range(32):  # no sum over threads: each turns its own bits
        row = group * 32 + r
        word = load_words(by_row + row.to(tl.int64) * N + n, (n < N) & (row < B))
        turned = turned | (((word[:, None] >> lane[None, :]) & 1) << r)
    col = n[:, None] * 32 + lane[None, :]
    at = group.to(tl.int64) * L + col
    tl.store(by_feature + at, turned.to(tl.int32, bitcast=True), mask=col < L)


@triton.jit
def encode_and_nominate(x, W_enc, b_enc, slack, by_row, B, L, D, N,
                        ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
                        BAND: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The encoder's product and `nominate` in one: h never leaves the chip.

    x [B, D] and W_enc [L, D] in the compute dtype. Programs go through a band of BAND blocks of
    rows before the next block of features, so that both stay in the L2 cache.
    """
    n_rows = tl.cdiv(B, ROWS)
    n_cols = tl.cdiv(L, COLS)
    band = tl.program_id(0) // (BAND * n_cols)
    height = tl.minimum(n_rows - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * n_cols)
    row0 = (band * BAND + within % height) * ROWS
    col0 = (within // height) * COLS
    row = row0 + tl.arange(0, ROWS)
    col = col0 + tl.arange(0, COLS)
    depth = tl.arange(0, DEPTH)
    x_at = x + row[:, None].to(tl.int64) * D + depth[None, :]
    w_at = W_enc + col[None, :].to(tl.int64) * D + depth[:, None]
    h = tl.zeros([ROWS, COLS], tl.float32)
    for d in range(0, D, DEPTH):
        inside = depth < D - d
        a = tl.load(x_at + d, mask=(row < B)[:, None] & inside[None, :], other=0)
        w = tl.load(w_at + d, mask=(col < L)[None, :] & inside[:, None], other=0)
        h = tl.dot(a, w, h, input_precision=PRECISION)
    bias = tl.load(b_enc + col, mask=col < L, other=0)[None, :]
    active = nominates(h, bias, slack) & (row < B)[:, None] & (col < L)[None, :]
    lane = tl.arange(0, 32)
    along_row = tl.reshape(active.to(tl.uint32), [ROWS, COLS // 32, 32]) << lane[None, None, :]
    word = tl.sum(along_row, axis=2).to(tl.int32, bitcast=True)
    n = col0 // 32 + tl.arange(0, COLS // 32)
    inside_words = (row < B)[:, None] & (n < N)[None, :]
    tl.store(by_row + row[:, None].to(tl.int64) * N + n[None, :], word, mask=inside_words)


@triton.jit
def count_by_feature(by_feature, before, count, n_chunks, G, L,
                     HOT: tl.constexpr, GROUPS: tl.constexpr, COLS: tl.constexpr):  # fmt: skip
    """before [G, L]: a feature's entries in earlier groups; count [L]; n_chunks [L] of hot ones."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.int32)
    for g0 in range(0, G, GROUPS):
        group = g0 + tl.arange(0, GROUPS)
        inside = (group < G)[:, None] & (col < L)[None, :]
        at = group[:, None].to(tl.int64) * L + col[None, :]
        n = popcount(load_words(by_feature + at, inside))
        tl.store(before + at, total[None, :] + tl.cumsum(n, 0) - n, mask=inside)
        total += tl.sum(n, 0)
    tl.store(count + col, total, mask=col < L)
    chunks = tl.where(total > HOT, (total + HOT - 1) // HOT, 0)
    tl.store(n_chunks + col, chunks, mask=col < L)


@triton.jit
def count_by_row(by_row, count, N, WORDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([WORDS], tl.int32)
    for n0 in range(0, N, WORDS):
        n = n0 + tl.arange(0, WORDS)
        total += popcount(load_words(by_row + row * N + n, n < N))
    tl.store(count + row, tl.sum(total, 0))


@triton.jit
def list_rows(by_feature, before, start, rows, L, capacity, COLS: tl.constexpr):
    """The order by feature: rows [E]."""
    group = tl.program_id(0)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    at = group.to(tl.int64) * L + col
    word = load_words(by_feature + at, col < L)
    place = tl.load(start + col, mask=col < L, other=0)
    place += tl.load(before + at, mask=col < L, other=0)
    for _ in range(tl.max(popcount(word), 0)):
        row = group * 32 + lowest_bit(word)
        tl.store(rows + place, row, mask=(word != 0) & (place < capacity))
        place += 1
        word = word & (word - 1)


@triton.jit
def list_features(by_row, by_feature, before, start, row_start, features, places, L, N, capacity,
                  WORDS: tl.constexpr):  # fmt: skip
    """The order by row: features [E], and each entry's place in the order by feature."""
    row = tl.program_id(0).to(tl.int64)
    earlier = (tl.full([1], 1, tl.uint32) << (row % 32).to(tl.uint32)) - 1  # rows of its group
    base = tl.load(row_start + row)
    for n0 in range(0, N, WORDS):
        n = n0 + tl.arange(0, WORDS)
        word = load_words(by_row + row * N + n, n < N)
        size = popcount(word)
        at = base + tl.cumsum(size, 0) - size
        for _ in range(tl.max(size, 0)):
            live = (word != 0) & (at < capacity)
            feature = n * 32 + lowest_bit(word)
            of_group = row // 32 * L + feature
            place = tl.load(start + feature, mask=live, other=0)
            place += tl.load(before + of_group, mask=live, other=0)
            of_its = tl.load(by_feature + of_group, mask=live, other=0)
            place += popcount(of_its.to(tl.uint32, bitcast=True) & earlier)
            place = tl.minimum(place, capacity - 1)  # beyond only where there is no room anyway
            tl.store(features + at, feature, mask=live)
            tl.store(places + at, place.to(tl.int32), mask=live)
            at += 1
            word = word & (word - 1)
        base += tl.sum(size, 0)


@triton.jit
def list_chunks(n_chunks, chunk_start, chunk_feature, L, capacity, COLS: tl.constexpr):
    """chunk_feature: whose each chunk of a hot feature is; there's room for `capacity`."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    left = tl.load(n_chunks + col, mask=col < L, other=0)
    at = tl.load(chunk_start + col, mask=col < L, other=0)
    for i in range(tl.max(left, 0)):
        tl.store(chunk_feature + at + i, col, mask=(left > i) & (at + i < capacity))


@triton.jit
def chunk(i, start, chunk_start, chunk_feature, capacity, HOT: tl.constexpr):
    """Feature, first and last entry of the i-th chunk."""
    feature = tl.load(chunk_feature + i).to(tl.int64)
    first = tl.load(start + feature) + (i - tl.load(chunk_start + feature)) * HOT
    last = tl.minimum(tl.load(start + feature + 1), first + HOT)
    return feature, first, tl.minimum(last, capacity)


@triton.jit
def evaluate_range(feature, first, last, x, W_enc, b_enc, rows, f, D,
                   WIDTH: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    d = tl.arange(0, WIDTH)
    w = tl.load(W_enc + feature * D + d, mask=d < D, other=0)
    bias = tl.load(b_enc + feature)
    for e in range(first, last, AT_ONCE):
        entry = e + tl.arange(0, AT_ONCE)
        live = entry < last
        row = tl.load(rows + entry, mask=live, other=0).to(tl.int64)
        inside = live[:, None] & (d < D)[None, :]
        x_rows = tl.load(x + row[:, None] * D + d[None, :], mask=inside, other=0)
        h = tl.sum(x_rows * w[None, :], axis=1) + bias
        tl.store(f + entry, activation(h), mask=live)


@triton.jit
def evaluate(x, W_enc, b_enc, start, chunk_start, chunk_feature, rows, f, L, D,
             capacity, chunk_capacity, n_workers, HOT: tl.constexpr, WIDTH: tl.constexpr,
             AT_ONCE: tl.constexpr):  # fmt: skip
    """f [E], the features' values. The first n_workers programs take the chunks of hot features."""
    program = tl.program_id(0)
    if program < n_workers:
        n = tl.minimum(tl.load(chunk_start + L), chunk_capacity)
        for i in range(program, n, n_workers):
            feature, first, last = chunk(i, start, chunk_start, chunk_feature, capacity, HOT)
            evaluate_range(feature, first, last, x, W_enc, b_enc, rows, f, D, WIDTH, AT_ONCE)
    else:
        feature = (program - n_workers).to(tl.int64)
        first = tl.load(start + feature)
        last = tl.load(start + feature + 1)
        if (last > first) & (last - first <= HOT):
            last = tl.minimum(last, capacity)
            evaluate_range(feature, first, last, x, W_enc, b_enc, rows, f, D, WIDTH, AT_ONCE)


@triton.jit
def decode(row_start, features, places, f, W_dec, b_dec, x, scale, errors, dx_hat, D,
           capacity, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """One row: errors = Σ f W_dec[feature] + b_dec - x, and dx_hat = scale · errors."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    first = tl.load(row_start + row)
    last = tl.minimum(tl.load(row_start + row + 1), capacity)
    x_hat = tl.load(b_dec + d, mask=d < D, other=0)
    for e in range(first, last, AT_ONCE):
        entry = e + tl.arange(0, AT_ONCE)
        live = entry < last
        feature = tl.load(features + entry, mask=live, other=0).to(tl.int64)
        place = tl.load(places + entry, mask=live, other=0)
        value = tl.load(f + place, mask=live, other=0)
        inside = live[:, None] & (d < D)[None, :]
        w = tl.load(W_dec + feature[:, None] * D + d[None, :], mask=inside, other=0)
        x_hat += tl.sum(value[:, None] * w.to(tl.float32), axis=0)
    error = x_hat - tl.load(x + row * D + d, mask=d < D, other=0)
    tl.store(errors + row * D + d, error, mask=d < D)
    tl.store(dx_hat + row * D + d, error * tl.load(scale + row), mask=d < D)
