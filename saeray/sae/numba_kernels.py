"""Loops over active entries for the CPU, compiled by Numba: what `sparse_step` is made of.

An *entry* is one feature that is active in one row: its row, its feature j, its value f. Entries of
a lane lie row after row (`offsets`), those of a batch feature after feature. All loops run in that
order, so the same entries give the same bits, on however many threads.

Compiled at the first call in a process, from a cache on disk where another process on the same
machine has compiled them before.  R rows, L = d_sae, D = d_in, O = d_out, n entries.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from saeray.sae import numba_screening
from saeray.sae.numba_compiled import REORDERED, compiled

FEATURES_AT_ONCE = 128  # whose gradients stay in the cache while tiles of rows pass by


@compiled()
def keep_active(feature, value, n, j, h, floor):
    """Writes entry n, feature j at h; returns how many there are then: one more if it is active."""
    feature[n] = j
    value[n] = h
    return n + (not (h <= floor[j]))


@compiled(fastmath=REORDERED)
def exact_values(offsets, feature, value, x_centred, W_enc, b_enc, floor):
    """Values of candidates in full precision; those not above their floor after all are dropped.

    x_centred [R, D], W_enc a row per feature [L, D], floor [L]. Returns how many entries are left.
    """
    n_rows, d_in = x_centred.shape
    zero = b_enc.dtype.type(0)
    n = 0
    begin = offsets[0]
    for r in range(n_rows):
        end = offsets[r + 1]
        x = x_centred[r]
        for i in range(begin, end, 4):
            # Four at a time: the row is read a quarter as often. Always four, so that a value does
            # not depend on which others are looked at beside it.
            j0, last = feature[i], end - 1
            j1, j2 = feature[min(i + 1, last)], feature[min(i + 2, last)]
            j3 = feature[min(i + 3, last)]
            w0, w1, w2, w3 = W_enc[j0], W_enc[j1], W_enc[j2], W_enc[j3]
            t0, t1, t2, t3 = zero, zero, zero, zero
            for d in range(d_in):
                t0 += x[d] * w0[d]
                t1 += x[d] * w1[d]
                t2 += x[d] * w2[d]
                t3 += x[d] * w3[d]
            n = keep_active(feature, value, n, j0, t0 + b_enc[j0], floor)
            if i + 1 < end:
                n = keep_active(feature, value, n, j1, t1 + b_enc[j1], floor)
            if i + 2 < end:
                n = keep_active(feature, value, n, j2, t2 + b_enc[j2], floor)
            if i + 3 < end:
                n = keep_active(feature, value, n, j3, t3 + b_enc[j3], floor)
        begin = end
        offsets[r + 1] = n
    return n


@compiled(fastmath=REORDERED)
def decode_rows(offsets, feature, value, W_dec, b_dec, x, scale, errors, dx_hat, df):
    """errors = x̂ - x, dx_hat = scale * errors, df [n] = ⟨dx_hat, W_dec[j]⟩ of each entry.

    W_dec [L, O], b_dec [O]; x, what is to be reconstructed, errors, dx_hat [R, O]; scale [R].
    """
    n_rows, d_in = x.shape
    zero = df.dtype.type(0)
    for r in range(n_rows):
        begin, end = offsets[r], offsets[r + 1]
        error = errors[r]
        for d in range(d_in):
            error[d] = b_dec[d] - x[r, d]
        i = begin
        while i + 4 <= end:  # four at a time: the row is read and written a quarter as often
            w0, w1, w2, w3 = (
                W_dec[feature[i]],
                W_dec[feature[i + 1]],
                W_dec[feature[i + 2]],
                W_dec[feature[i + 3]],
            )
            f0, f1, f2, f3 = value[i], value[i + 1], value[i + 2], value[i + 3]
            for d in range(d_in):
                error[d] += f0 * w0[d] + f1 * w1[d] + f2 * w2[d] + f3 * w3[d]
            i += 4
        while i < end:
            w, f = W_dec[feature[i]], value[i]
            for d in range(d_in):
                error[d] += f * w[d]
            i += 1
        dx = dx_hat[r]
        for d in range(d_in):
            dx[d] = error[d] * scale[r]
        i = begin
        while i + 4 <= end:
            w0, w1, w2, w3 = (
                W_dec[feature[i]],
                W_dec[feature[i + 1]],
                W_dec[feature[i + 2]],
                W_dec[feature[i + 3]],
            )
            t0, t1, t2, t3 = zero, zero, zero, zero
            for d in range(d_in):
                t0 += dx[d] * w0[d]
                t1 += dx[d] * w1[d]
                t2 += dx[d] * w2[d]
                t3 += dx[d] * w3[d]
            df[i], df[i + 1], df[i + 2], df[i + 3] = t0, t1, t2, t3
            i += 4
        while i < end:
            w = W_dec[feature[i]]
            total = zero
            for d in range(d_in):
                total += dx[d] * w[d]
            df[i] = total
            i += 1


@compiled(fastmath=REORDERED)
def decode_levels(offsets, feature, value, widths, W_dec, b_dec, x, scale, errors, dx_hat, df):
    """`decode_rows` of several widths: the first w features must reconstruct x for each w of them.

    widths ascending, the last L. dx_hat [widths, R, D]: row i is of width i and all above it, which
    is what a feature gets that comes in with width i. errors are of the last width. Returns half of
    Σ scale ‖error‖² of the others.
    """
    n_rows, d_in = x.shape
    last = len(widths) - 1
    zero = df.dtype.type(0)
    inner = 0.0
    for r in range(n_rows):
        begin, end = offsets[r], offsets[r + 1]
        error = errors[r]
        for d in range(d_in):
            error[d] = b_dec[d] - x[r, d]
        i = begin
        for level in range(last + 1):
            while i < end and feature[i] < widths[level]:
                w, f = W_dec[feature[i]], value[i]
                for d in range(d_in):
                    error[d] += f * w[d]
                i += 1
            dx = dx_hat[level, r]
            squared = zero
            for d in range(d_in):
                dx[d] = error[d] * scale[r]
                squared += error[d] * error[d]
            if level < last:
                inner += squared * scale[r] / 2
        for level in range(last - 1, -1, -1):
            dx, above = dx_hat[level, r], dx_hat[level + 1, r]
            for d in range(d_in):
                dx[d] += above[d]
        level = 0
        for i in range(begin, end):
            while feature[i] >= widths[level]:
                level += 1
            w, dx = W_dec[feature[i]], dx_hat[level, r]
            total = zero
            for d in range(d_in):
                total += dx[d] * w[d]
            df[i] = total
    return inner


@compiled()
def count_by_feature(offsets, feature, tile_rows, first_tile, n_features, starts):
    """Adds to starts [tiles * L + 1] how often each feature occurs in each tile, one place up.

    Of one lane; a tile are so many of its rows.
    """
    for r in range(len(offsets) - 1):
        at = (first_tile + r // tile_rows) * n_features + 1
        for i in range(offsets[r], offsets[r + 1]):
            starts[at + feature[i]] += 1


@compiled()
def place_by_feature(
    offsets, feature, value, dh, tile_rows, first_tile, n_features, first, places, sorted_
):
    """Copies a lane's entries to where their tile's and feature's lie; places [tiles * L] moves on.

    sorted_ [n, 3]: row, from `first` on, value, dh; together, as places are written at random.
    """
    for r in range(len(offsets) - 1):
        at = (first_tile + r // tile_rows) * n_features
        for i in range(offsets[r], offsets[r + 1]):
            p = places[at + feature[i]]
            places[at + feature[i]] = p + 1
            sorted_[p, 0] = first + r
            sorted_[p, 1] = value[i]
            sorted_[p, 2] = dh[i]


@compiled(fastmath=REORDERED)
def weight_gradients(
    first, last, starts, sorted_, x_centred, dx_hat, dW_enc, dW_dec, db_enc, fired, f
):
    """Of features first to last: dW_enc [L, D], dW_dec [L, O]; db_enc = Σ dh, fired, f = Σ f [L].

    Entries tile after tile, in it feature after feature (starts [tiles * L + 1]), each feature's in
    the order of its rows. x_centred [B, D], dx_hat [B, O]. Some features at a time and a tile of
    rows at a time: then what is read and what is written are in the cache.
    """
    d_in, d_out = x_centred.shape[1], dx_hat.shape[1]
    n_features = len(db_enc)
    n_tiles = (len(starts) - 1) // n_features
    zero = f.dtype.type(0)
    for some in range(first, last, FEATURES_AT_ONCE):
        end_of_some = min(some + FEATURES_AT_ONCE, last)
        for j in range(some, end_of_some):
            dW_enc[j] = 0
            dW_dec[j] = 0
            db_enc[j], f[j], fired[j] = 0, 0, 0
        for tile in range(n_tiles):
            for j in range(some, end_of_some):
                i, end = starts[tile * n_features + j], starts[tile * n_features + j + 1]
                to_enc, to_dec = dW_enc[j], dW_dec[j]
                sum_dh, sum_f = zero, zero
                n_fired = 0
                while i + 4 <= end:
                    r0, r1 = int(sorted_[i, 0]), int(sorted_[i + 1, 0])
                    r2, r3 = int(sorted_[i + 2, 0]), int(sorted_[i + 3, 0])
                    x0, x1, x2, x3 = x_centred[r0], x_centred[r1], x_centred[r2], x_centred[r3]
                    e0, e1, e2, e3 = dx_hat[r0], dx_hat[r1], dx_hat[r2], dx_hat[r3]
                    f0, f1, f2, f3 = (
                        sorted_[i, 1],
                        sorted_[i + 1, 1],
                        sorted_[i + 2, 1],
                        sorted_[i + 3, 1],
                    )
                    h0, h1, h2, h3 = (
                        sorted_[i, 2],
                        sorted_[i + 1, 2],
                        sorted_[i + 2, 2],
                        sorted_[i + 3, 2],
                    )
                    for d in range(d_out):
                        to_dec[d] += f0 * e0[d] + f1 * e1[d] + f2 * e2[d] + f3 * e3[d]
                    for d in range(d_in):
                        to_enc[d] += h0 * x0[d] + h1 * x1[d] + h2 * x2[d] + h3 * x3[d]
                    sum_dh += h0 + h1 + h2 + h3
                    sum_f += f0 + f1 + f2 + f3
                    n_fired += (not (f0 <= 0)) + (not (f1 <= 0)) + (not (f2 <= 0)) + (not (f3 <= 0))
                    i += 4
                while i < end:
                    x0, e0 = x_centred[int(sorted_[i, 0])], dx_hat[int(sorted_[i, 0])]
                    f0, h0 = sorted_[i, 1], sorted_[i, 2]
                    for d in range(d_out):
                        to_dec[d] += f0 * e0[d]
                    for d in range(d_in):
                        to_enc[d] += h0 * x0[d]
                    sum_dh += h0
                    sum_f += f0
                    n_fired += not (f0 <= 0)
                    i += 1
                db_enc[j] += sum_dh
                f[j] += sum_f
                fired[j] += n_fired


@compiled(fastmath=REORDERED)
def add_decoder_gradient(first, last, starts, sorted_, dx_hat, dW_dec):
    """Adds Σ value dx_hat to rows first to last of dW_dec; as in `weight_gradients`."""
    n_features = len(dW_dec)
    for tile in range((len(starts) - 1) // n_features):
        for j in range(first, last):
            to_dec = dW_dec[j]
            for i in range(starts[tile * n_features + j], starts[tile * n_features + j + 1]):
                e, value = dx_hat[int(sorted_[i, 0])], sorted_[i, 1]
                for d in range(dx_hat.shape[1]):
                    to_dec[d] += value * e[d]


@compiled(fastmath=REORDERED)
def remove_parallel(first, last, gradient, W_dec):
    """Of rows first to last: subtracts the component along the (unit) row of W_dec; both [L, D]."""
    d_in = W_dec.shape[1]
    zero = W_dec.dtype.type(0)
    for j in range(first, last):
        g, w = gradient[j], W_dec[j]
        along = zero
        for d in range(d_in):
            along += g[d] * w[d]
        for d in range(d_in):
            g[d] -= along * w[d]


def warm_up() -> None:
    """Compiles every kernel for float32, or has it from the cache; one process at a time.

    The others on this machine wait for the first and then find what it has compiled.
    """
    lock = Path(tempfile.gettempdir()) / f"saeray-kernels-{os.getuid()}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        one_entry(np.float32)
        numba_screening.warm_up(np.float32)


def one_entry(dtype: Any) -> None:
    """Through every kernel."""
    unit, n = np.ones((1, 1), dtype), np.zeros(1, dtype)
    offsets, feature = np.zeros(2, np.int64), np.zeros(2, np.int32)
    exact_values(offsets, feature, n, unit, unit, unit[0], n.copy())
    decode_rows(offsets, feature, n, unit, unit[0], unit, unit[0], unit.copy(), unit.copy(), n)
    levels = unit.reshape(1, 1, 1).copy()
    widths = np.ones(1, np.int64)
    decode_levels(offsets, feature, n, widths, unit, unit[0], unit, unit[0], unit.copy(), levels, n)
    starts, sorted_ = np.zeros(2, np.int64), np.zeros((1, 3), dtype)
    count_by_feature(offsets, feature, 1, 0, 1, starts)
    place_by_feature(offsets, feature, n, n, 1, 0, 1, 0, np.zeros(1, np.int64), sorted_)
    fired = np.zeros(1, np.float32)
    weight_gradients(
        0, 1, starts, sorted_, unit, unit, unit.copy(), unit.copy(), n.copy(), fired, n.copy()
    )
    add_decoder_gradient(0, 1, starts, sorted_, unit, unit.copy())
    remove_parallel(0, 1, unit.copy(), unit)
