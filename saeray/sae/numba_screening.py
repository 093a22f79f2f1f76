"""Loops of `screening`, compiled by Numba: whole numbers of rows, and what might be active.

product [R, L] is a block's and off by no more than a [R] * residual [L] + g [R] * norm [L], in its
own units, of which a row's pre-activation of 1 is u [R] and a bias of 1 has been divided already.
Entries lie as in `numba_kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saeray.sae.numba_compiled import REORDERED, compiled

SOME = 512  # features whose values are looked at before the bar is raised; a multiple of 8


@compiled(fastmath=REORDERED)
def quantize_rows(first, last, rows, factor, whole, step, norm_whole, norm_left, norm):
    """Rows first to last of rows [N, D], times factor [D], as step * whole + what is left over.

    whole [N, D] from -127 to 127; the norms of all three are in units of the row's step. Those of a
    row with a number that is not finite are not either.
    """
    d_in = rows.shape[1]
    zero, one = step.dtype.type(0), step.dtype.type(1)
    most, smallest, infinity = step.dtype.type(127), step.dtype.type(1e-30), step.dtype.type(np.inf)
    for r in range(first, last):
        row, q = rows[r], whole[r]
        largest = zero
        for d in range(d_in):
            largest = max(largest, abs(row[d] * factor[d]))
        per_step = one
        if smallest < largest < infinity:
            per_step = most / largest
        of_whole, of_left, of_row = zero, zero, zero
        for d in range(d_in):
            v = row[d] * factor[d] * per_step
            k = np.rint(v)
            q[d] = np.int8(k)
            of_whole += k * k
            of_left += (v - k) * (v - k)
            of_row += v * v
        step[r] = one / per_step
        norm_whole[r], norm_left[r], norm[r] = np.sqrt(of_whole), np.sqrt(of_left), np.sqrt(of_row)


@compiled()
def flags_of(n):
    """Room for n flags, [n] and more, none of them set; and the same, eight to a word."""
    words = np.zeros(-(-n // 8), np.uint64)
    return words.view(np.uint8), words


@compiled()
def append_flagged(flags, words, feature, n):
    """Appends the places of flags that are set, ascending, to n others; returns how many then."""
    for w in range(len(words)):
        if words[w] != 0:  # most are not
            for j in range(8 * w, 8 * w + 8):  # without a branch: the next one overwrites it
                feature[n] = j
                n += flags[j]
    return n


@compiled(fastmath=REORDERED)
def select_candidates(product, bias, residual, norm, u, a, g, first, offsets, feature, n):
    """Appends features that might be active in a block of rows to n others: (rows done, n then).

    bias [L]: what is added to a product, less the floor, and more for roundings. What is not a
    number might be active: an SAE with such a weight must not look like one that is silent.

    offsets[first + r + 1] becomes the end of row r. Ends before a row that might not fit.
    """
    n_rows, n_features = product.shape
    room = len(feature)
    number = bias.dtype.type
    zero = number(0)
    might, words = flags_of(n_features)
    for r in range(n_rows):
        if n + n_features + 8 > room:
            return r, n
        row = product[r]
        u_r, a_r, g_r = u[first + r], a[first + r], g[first + r]
        for j in range(n_features):
            most = number(row[j]) + (bias[j] * u_r + residual[j] * a_r + norm[j] * g_r)
            might[j] = not (most <= zero)
        n = append_flagged(might, words, feature, n)
        offsets[first + r + 1] = n
    return n_rows, n


@compiled()
def sift(key, at, n):
    """Restores the order of a heap of n keys, smallest first, below place `at`."""
    while True:
        child = 2 * at + 1
        if child >= n:
            return
        if child + 1 < n and key[child + 1] < key[child]:
            child += 1
        if key[at] <= key[child]:
            return
        key[at], key[child] = key[child], key[at]
        at = child


@compiled(fastmath=REORDERED)
def select_largest(
    product, bias, slack, residual, norm, weight, k, u, a, g, first, offsets, feature, n
):
    """`select_candidates` of those alone that might be among a row's k largest.

    Pre-activations are compared times weight [L] >= 0. slack [L]: how far off bias [L] may be. The
    k largest of what each is at least are kept in a heap; who might be more than the last is named.
    """
    n_rows, n_features = product.shape
    room = len(feature)
    number = bias.dtype.type
    zero = number(0)
    might, words = flags_of(n_features)
    key = np.empty(k, bias.dtype)
    for r in range(n_rows):
        if n + n_features + 8 > room:
            return r, n
        row = product[r]
        u_r, a_r, g_r = u[first + r], a[first + r], g[first + r]
        held, bar = 0, zero
        for begin in range(0, n_features, SOME):
            end = min(begin + SOME, n_features)
            for j in range(begin, end):
                off = slack[j] * u_r + residual[j] * a_r + norm[j] * g_r
                might[j] = (number(row[j]) + bias[j] * u_r - off) * weight[j] > bar
            for w in range(begin // 8, (end + 7) // 8):
                if words[w] == 0:
                    continue
                for j in range(8 * w, min(8 * w + 8, n_features)):
                    off = slack[j] * u_r + residual[j] * a_r + norm[j] * g_r
                    least = (number(row[j]) + bias[j] * u_r - off) * weight[j]
                    if not (least > bar):
                        continue
                    if held < k:
                        key[held] = least
                        held += 1
                        if held == k:
                            for at in range(k // 2, -1, -1):
                                sift(key, at, k)
                            bar = key[0]
                    else:
                        key[0] = least
                        sift(key, 0, k)
                        bar = key[0]
        for j in range(n_features):
            off = slack[j] * u_r + residual[j] * a_r + norm[j] * g_r
            most = (number(row[j]) + bias[j] * u_r + off) * weight[j]
            might[j] = (not (most <= zero)) & (not (most < bar))
        n = append_flagged(might, words, feature, n)
        offsets[first + r + 1] = n
    return n_rows, n


@compiled()
def keep_largest(offsets, feature, value, weight, k):
    """Of each row's entries the k largest, value * weight [L]; of equal ones, the first.

    What is not a number counts as larger than all, so that it is seen. Returns how many are left.
    """
    longest = 0
    for r in range(len(offsets) - 1):
        longest = max(longest, offsets[r + 1] - offsets[r])
    key = np.empty(longest, value.dtype)
    infinity = value.dtype.type(np.inf)
    n = 0
    begin = offsets[0]
    for r in range(len(offsets) - 1):
        end = offsets[r + 1]
        m = end - begin
        for i in range(m):
            key[i] = value[begin + i] * weight[feature[begin + i]]
            if np.isnan(key[i]):
                key[i] = infinity
        last, equal = -infinity, m
        if m > k:
            ordered = np.sort(key[:m])
            last = ordered[m - k]
            above = 0
            while above < k and ordered[m - 1 - above] > last:
                above += 1
            equal = k - above
        for i in range(m):
            if key[i] < last:
                continue
            if key[i] == last:
                if equal == 0:
                    continue
                equal -= 1
            feature[n], value[n] = feature[begin + i], value[begin + i]
            n += 1
        begin = end
        offsets[r + 1] = n
    return n


def warm_up(dtype: Any) -> None:
    """Through every loop."""
    unit, n, i = np.ones((1, 1), dtype), np.zeros(1, dtype), np.zeros(1, np.int32)
    offsets = np.zeros(2, np.int64)
    quantize_rows(0, 1, unit, n, np.zeros((1, 1), np.int8), n.copy(), n.copy(), n.copy(), n.copy())
    for product in (np.ones((1, 1), np.int32), unit):
        select_candidates(product, n, n, n, n, n, n, 0, offsets, i, 0)
        select_largest(product, n, n, n, n, n, 1, n, n, n, 0, offsets, i, 0)
    keep_largest(offsets, i, n, n, 1)
