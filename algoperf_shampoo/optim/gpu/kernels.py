"""GPU kernels (Triton) for all stacks of a model at once; imported by the package's
``triton_kernels()``.

A launch takes two tables. ``groups`` (int64, WORDS words a row) says where a stack's tensors are:
addresses and sizes. ``tiles`` (int32, 4 or 6 words a row) says what each program does: which group,
which row of the stack, where in it. So stacks of different shapes share one launch.

Products run on tensor cores at float32 accuracy: each operand, scaled by a power of two so that its
largest entry is just below 2^15, is split into two float16 numbers of 11 bits, a = high + low, and
a b = low high + high low + high high (Ootomo and Yokota 2022, arXiv:2203.03341). The scale keeps
entries down to 2^-17 of the largest exact to 22 bits, and what is smaller to 2^-39 of the largest.
Tensor cores round sums towards zero, so sums over k leave them after every BK entries.

The largest absolute entry of every row of a stack ("absmax") is kept as the bits of a float32: bits
of non-negative numbers are ordered as the numbers are, nan above all, so that an integer atomic
maximum works, and its result does not depend on the order.
"""

# No `from __future__ import annotations`: Triton reads the annotations.

import triton
from triton import language as tl

WORDS = tl.constexpr(18)


@triton.jit
def _exponent(absmax):
    """e such that absmax * 2^e is in [2^14, 2^15), within what leaves 2^-e a normal number."""
    e = 14 + 127 - (absmax.to(tl.int32, bitcast=True) >> 23)
    return tl.minimum(tl.maximum(e, -126), 126)


@triton.jit
def _power(e):
    """2^e."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _float_pointer(word):
    """The address of a tensor in a table as a pointer, for loads of several entries at a time.

    It starts at a multiple of 16 bytes, but for operators and factors of odd sizes, and those have
    no such loads: their rows are not said to be aligned.
    """
    return tl.multiple_of(tl.load(word).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _load_of_row(word, row):
    """One number of a row (its absmax, say), given the address of all rows' in a table."""
    return tl.load(tl.load(word).to(tl.pointer_type(tl.float32)) + row)


@triton.jit
def _raise_top(word, row, values):
    """Let the absmax at a table's address know of some values."""
    absmax = tl.max(tl.max(tl.abs(values).to(tl.int32, bitcast=True), 1), 0)
    tl.atomic_max(tl.load(word).to(tl.pointer_type(tl.int32)) + row, absmax)


@triton.jit
def _mark(word, row):
    """Not zero where a row's gradient is not to be learnt from, given the address of all marks."""
    return tl.load(tl.load(word).to(tl.pointer_type(tl.int32)) + row)


@triton.jit
def _split_dot(a, b):
    """a b, accurate to float32, of scaled tiles."""
    a_high = a.to(tl.float16)
    b_high = b.to(tl.float16)
    a_low = (a - a_high.to(tl.float32)).to(tl.float16)
    b_low = (b - b_high.to(tl.float32)).to(tl.float16)
    part = tl.dot(a_low, b_high)
    part = tl.dot(a_high, b_low, part)
    return tl.dot(a_high, b_high, part)


@triton.jit
def _average(factor, d, r, c, mirrored, total, beta, weight, bad):
    """factor [d, d] <- beta factor + weight total at rows r and columns c, and the other way
    round; as it is, if ``bad`` is not zero."""
    mask = (r[:, None] < tl.where(bad == 0, d, 0)) & (c[None, :] < d)
    old = tl.load(factor + r[:, None] * d + c[None, :], mask=mask, other=0.0)
    new = old * beta + total * weight
    tl.store(factor + r[:, None] * d + c[None, :], new, mask=mask)
    if mirrored:
        tl.store(factor + r[:, None] + c[None, :] * d, new, mask=mask)


@triton.jit
def product(
    groups,
    tiles,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    BETWEEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN_M: tl.constexpr,
    ALIGN_N: tl.constexpr,
    ALIGN_K: tl.constexpr,
):
    """c[row] = A[row] B[row], A [M, K], B [K, N], c [rows, M, N].

    a is A' [rows, K, M], or A with A_ROWS; b is B [rows, K, N], or B' with B_ROWS. BETWEEN: a is
    [rows, M / post, K, post], and c likewise with N. Group: a, b, c, absmax of a, of b, of c, M, N,
    K, post. Tile: group, row, first m, first n. SPLIT: float32 accuracy, else inputs of 11 bits.
    """
    tile = tiles + tl.program_id(0) * 4
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    m = tl.multiple_of(tl.load(tile + 2), 16) + tl.arange(0, BM)
    n = tl.multiple_of(tl.load(tile + 3), 16) + tl.arange(0, BN)
    M = tl.multiple_of(tl.load(group + 6).to(tl.int32), ALIGN_M)
    N = tl.multiple_of(tl.load(group + 7).to(tl.int32), ALIGN_N)
    K = tl.multiple_of(tl.load(group + 8).to(tl.int32), ALIGN_K)
    a_ptr = _float_pointer(group) + row * M * K
    b_ptr = _float_pointer(group + 1) + row * K * N
    c_ptr = _float_pointer(group + 2) + row * M * N
    e_a = _exponent(_load_of_row(group + 3, row))
    e_b = _exponent(_load_of_row(group + 4, row))
    scale_a, scale_b = _power(e_a), _power(e_b)
    if BETWEEN:
        post = tl.load(group + 9).to(tl.int32)
        outside = m // post * post
        a_ptr += outside[:, None] * K + (m - outside)[:, None]
        c_ptr += outside[:, None] * N + (m - outside)[:, None]
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        if BETWEEN:
            mask = (m[:, None] < M) & (k[None, :] < K)
            a = tl.load(a_ptr + k[None, :] * post, mask=mask, other=0.0) * scale_a
        elif A_ROWS:
            mask = (m[:, None] < M) & (k[None, :] < K)
            a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=mask, other=0.0) * scale_a
        else:
            mask = (k[:, None] < K) & (m[None, :] < M)
            a = tl.load(a_ptr + k[:, None] * M + m[None, :], mask=mask, other=0.0)
            a = tl.trans(a * scale_a)
        if B_ROWS:
            mask = (n[:, None] < N) & (k[None, :] < K)
            b = tl.load(b_ptr + n[:, None] * K + k[None, :], mask=mask, other=0.0)
            b = tl.trans(b * scale_b)
        else:
            mask = (k[:, None] < K) & (n[None, :] < N)
            b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=mask, other=0.0) * scale_b
        if SPLIT:
            total += _split_dot(a, b)
        else:
            total = tl.dot(a.to(tl.float16), b.to(tl.float16), total)
    total = total * _power(-e_a) * _power(-e_b)
    _raise_top(group + 5, row, total)
    mask = (m[:, None] < M) & (n[None, :] < N)
    if BETWEEN:
        tl.store(c_ptr + n[None, :] * post, total, mask=mask)
    else:
        tl.store(c_ptr + m[:, None] * N + n[None, :], total, mask=mask)


@triton.jit
def matvec(
    groups,
    tiles,
    B_ROWS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN_K: tl.constexpr,
):
    """:func:`product` for M = 1 and N = K, in float32: a [rows, K], c [rows, K]; absmax of a and b
    are not read."""
    tile = tiles + tl.program_id(0) * 4
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    n = tl.multiple_of(tl.load(tile + 3), 16) + tl.arange(0, BN)
    K = tl.multiple_of(tl.load(group + 8).to(tl.int32), ALIGN_K)
    a_ptr = _float_pointer(group) + row * K
    b_ptr = _float_pointer(group + 1) + row * K * K
    if B_ROWS:
        total = tl.zeros((BN, BK), tl.float32)
    else:
        total = tl.zeros((BK, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(a_ptr + k, mask=k < K, other=0.0)
        if B_ROWS:
            mask = (n[:, None] < K) & (k[None, :] < K)
            total += tl.load(b_ptr + n[:, None] * K + k[None, :], mask=mask, other=0.0) * a[None, :]
        else:
            mask = (k[:, None] < K) & (n[None, :] < K)
            total += tl.load(b_ptr + k[:, None] * K + n[None, :], mask=mask, other=0.0) * a[:, None]
    c = tl.sum(total, 1 if B_ROWS else 0)
    _raise_top(group + 5, row, c[None, :])
    tl.store(_float_pointer(group + 2) + row * K + n, c, mask=n < K)


@triton.jit
def gram(
    groups,
    tiles,
    partial_ptr,
    beta,
    weight,
    COLUMNS: tl.constexpr,
    IN_PIECES: tl.constexpr,
    MEAN: tl.constexpr,
    SCALED: tl.constexpr,
    S: tl.constexpr,
    BK: tl.constexpr,
    ALIGN_D: tl.constexpr,
    ALIGN_K: tl.constexpr,
):
    """factor <- beta factor + weight X X', one triangle computed and mirrored.

    x is X [rows, d, K], or X' [rows, K, d] with COLUMNS. Group: x, factor, absmax of x, d, K, marks
    of bad rows, scales, absmax of scales. Tile: group, row, first row, first column <= first row,
    first k, last k + 1. IN_PIECES: X X' over the tile's k goes to ``partial_ptr`` [tiles, S, S]
    instead. MEAN: divided by K. SCALED: column k of X is multiplied by scales [rows, K] first.
    """
    tile = tiles + tl.program_id(0) * 6
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    i = tl.multiple_of(tl.load(tile + 2), 16)
    j = tl.multiple_of(tl.load(tile + 3), 16)
    first = tl.multiple_of(tl.load(tile + 4), 16)
    last = tl.multiple_of(tl.load(tile + 5), ALIGN_K)
    d = tl.multiple_of(tl.load(group + 3).to(tl.int32), ALIGN_D)
    K = tl.multiple_of(tl.load(group + 4).to(tl.int32), ALIGN_K)
    x = _float_pointer(group) + row * d * K
    absmax = _load_of_row(group + 2, row)
    if SCALED:
        absmax *= _load_of_row(group + 7, row)
        scales = tl.load(group + 6).to(tl.pointer_type(tl.float32)) + row * K
    e = _exponent(absmax)
    scale = _power(e)
    r = i + tl.arange(0, S)
    c = j + tl.arange(0, S)
    total = tl.zeros((S, S), tl.float32)
    for start in range(first, last, BK):
        k = start + tl.arange(0, BK)
        if COLUMNS:
            here = k[:, None] < last
            a = tl.load(x + k[:, None] * d + r[None, :], mask=here & (r[None, :] < d), other=0.0)
            b = tl.load(x + k[:, None] * d + c[None, :], mask=here & (c[None, :] < d), other=0.0)
            if SCALED:
                s = tl.load(scales + k, mask=k < last, other=0.0) * scale
                a, b = tl.trans(a * s[:, None]), b * s[:, None]
            else:
                a, b = tl.trans(a * scale), b * scale
        else:
            here = k[None, :] < last
            a = tl.load(x + r[:, None] * K + k[None, :], mask=here & (r[:, None] < d), other=0.0)
            b = tl.load(x + c[:, None] * K + k[None, :], mask=here & (c[:, None] < d), other=0.0)
            if SCALED:
                s = tl.load(scales + k, mask=k < last, other=0.0) * scale
                a, b = a * s[None, :], tl.trans(b * s[None, :])
            else:
                a, b = a * scale, tl.trans(b * scale)
        total += _split_dot(a, b)
    total = total * _power(-e) * _power(-e)
    if MEAN:
        total /= K
    if IN_PIECES:
        inside = tl.arange(0, S)
        partial = partial_ptr + tl.program_id(0).to(tl.int64) * S * S
        tl.store(partial + inside[:, None] * S + inside[None, :], total)
    else:
        factor = _float_pointer(group + 1) + row * d * d
        _average(factor, d, r, c, i != j, total, beta, weight, _mark(group + 5, row))


@triton.jit
def gram_of_pieces(groups, tiles, partial_ptr, beta, weight, S: tl.constexpr):
    """factor <- beta factor + weight (sum of pieces), in their order.

    Tile: group, row, first row, first column, first piece, last piece + 1.
    """
    tile = tiles + tl.program_id(0) * 6
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    i, j = tl.load(tile + 2), tl.load(tile + 3)
    d = tl.load(group + 3).to(tl.int32)
    inside = tl.arange(0, S)
    total = tl.zeros((S, S), tl.float32)
    first = tl.load(tile + 4)
    partial = partial_ptr + first.to(tl.int64) * S * S + inside[:, None] * S + inside[None, :]
    for _ in range(first, tl.load(tile + 5)):
        total += tl.load(partial)
        partial += S * S
    r, c = i + inside, j + inside
    factor = _float_pointer(group + 1) + row * d * d
    _average(factor, d, r, c, i != j, total, beta, weight, _mark(group + 5, row))


@triton.jit
def outer(groups, tiles, beta, weight, S: tl.constexpr, ALIGN_D: tl.constexpr):
    """factor <- beta factor + weight x x' for vectors x [rows, d], in float32.

    Group: x, factor, -, d, -, marks of bad rows. Tile: group, row, first row, first column, -, -.
    """
    tile = tiles + tl.program_id(0) * 6
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    r = tl.multiple_of(tl.load(tile + 2), 16) + tl.arange(0, S)
    c = tl.multiple_of(tl.load(tile + 3), 16) + tl.arange(0, S)
    d = tl.multiple_of(tl.load(group + 3).to(tl.int32), ALIGN_D)
    x = _float_pointer(group) + row * d
    where = _float_pointer(group + 1) + row * d * d + r[:, None] * d + c[None, :]
    mask = (r[:, None] < tl.where(_mark(group + 5, row) == 0, d, 0)) & (c[None, :] < d)
    square = tl.load(x + r, mask=r < d, other=0.0)[:, None]
    square = square * tl.load(x + c, mask=c < d, other=0.0)[None, :]
    tl.store(where, tl.load(where, mask=mask, other=0.0) * beta + weight * square, mask=mask)


@triton.jit
def row_absmax(groups, tiles, SIZE: tl.constexpr, ALIGN: tl.constexpr):
    """The absmax of every row. Group: x, absmax, entries a row. Tile: group, row, first entry."""
    tile = tiles + tl.program_id(0) * 4
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    size = tl.multiple_of(tl.load(group + 2), ALIGN)
    k = tl.multiple_of(tl.load(tile + 2), 16) + tl.arange(0, SIZE)
    x = tl.load(_float_pointer(group) + row * size + k, mask=k < size, other=0.0)
    _raise_top(group + 1, row, x[None, :])


@triton.jit
def judge(first, row_of, row_absmax, bad_rows, bad_params, counts, count, bound):
    """Mark the parameters whose gradients have an absmax >= bound (bits of a float32), and their
    rows, and count them; see :class:`..nonfinite.Marks`. One program a parameter."""
    param = tl.program_id(0)
    start, stop = tl.load(first + param), tl.load(first + param + 1)
    absmax = tl.load(row_absmax + tl.load(row_of + start))
    for k in range(start + 1, stop):
        absmax = tl.maximum(absmax, tl.load(row_absmax + tl.load(row_of + k)))
    bad = (absmax >= bound).to(tl.int32)
    for k in range(start, stop):
        tl.store(bad_rows + tl.load(row_of + k), bad)
    tl.store(bad_params + param, bad)
    tl.store(counts + param, tl.load(counts + param) + bad)
    in_a_row = counts + count + param
    tl.store(in_a_row, (tl.load(in_a_row) + 1) * bad)


@triton.jit
def limits(groups, tiles, first, second, SIZE: tl.constexpr):
    """(k S)^2 (1 - beta2^t) of every row, see :mod:`..noise`: k^2 times the trace of a factor, k =
    first + second / sqrt(entries).

    Group: factor, limits, d, entries. Tile: group, row, -, -. One program a row.
    """
    tile = tiles + tl.program_id(0) * 4
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    d = tl.load(group + 2).to(tl.int32)
    factor = tl.load(group).to(tl.pointer_type(tl.float32)) + row * d * d
    total = tl.zeros((SIZE,), tl.float32)
    for start in range(0, d, SIZE):
        k = start + tl.arange(0, SIZE)
        total += tl.load(factor + k * (d + 1), mask=k < d, other=0.0)
    level = first + second / tl.sqrt(tl.load(group + 3).to(tl.float32))
    limit = tl.sum(total, 0) * level * level
    tl.store(tl.load(group + 1).to(tl.pointer_type(tl.float32)) + row, limit)


@triton.jit
def adam(
    groups,
    tiles,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    NADAM: tl.constexpr,
    SIZE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Both moments, and Adam's direction in place of x; see :func:`..arithmetic.adam_`.

    rest1, rest2: 1 - beta1, 1 - beta2, which in float32 would be off by 1e-5. Group: x, m, v,
    absmax of the direction, 1 - beta1^t and 1 - beta2^t (one a row), entries a row, marks of bad
    rows, which keep their moments and get the direction 0, limits of noise (:func:`limits`; 0:
    none), factors of the direction. Tile: group, row, first entry.
    """
    tile = tiles + tl.program_id(0) * 4
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    size = tl.multiple_of(tl.load(group + 6), ALIGN)
    k = tl.multiple_of(tl.load(tile + 2), 16) + tl.arange(0, SIZE)
    mask = k < size
    x_ptr = _float_pointer(group) + row * size + k
    m_ptr = _float_pointer(group + 1) + row * size + k
    v_ptr = _float_pointer(group + 2) + row * size + k
    x = tl.load(x_ptr, mask=mask, other=0.0)
    m = tl.load(m_ptr, mask=mask, other=0.0)
    v = tl.load(v_ptr, mask=mask, other=0.0)
    m += (x - m) * rest1
    v = v * beta2 + x * x * rest2
    u = x + (m - x) * beta1 if NADAM else m
    c1 = _load_of_row(group + 4, row)
    c2 = _load_of_row(group + 5, row)
    u *= _load_of_row(group + 9, row) / ((tl.sqrt(v) / tl.sqrt(c2) + eps) * c1)
    square = c1 * c1
    limit = _load_of_row(group + 8, row) * square
    u = tl.where(tl.maximum(v * square, m * m * c2) < limit, 0.0, u)
    learns = k < tl.where(_mark(group + 7, row) == 0, size, 0)
    u = tl.where(learns, u, 0.0)
    _raise_top(group + 3, row, u[None, :])
    tl.store(x_ptr, u, mask=mask)
    tl.store(m_ptr, m, mask=learns)
    tl.store(v_ptr, v, mask=learns)


@triton.jit
def criterion(
    a_ptr, q_ptr, aq_ptr, scale_ptr, off_ptr, norm_ptr, n, R: tl.constexpr, C: tl.constexpr
):
    """Per column of AQ - Q diag(Q'AQ) and of A, divided by the scale: sums of squares [N, n].

    a, q, aq: [N, n, n]; scale: [N]. One program per matrix and C of its columns, R rows at a time.
    """
    matrix = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    row = tl.arange(0, R)
    scale = 1.0 / tl.load(scale_ptr + matrix)
    base = matrix * n * n
    lam = tl.zeros((C,), tl.float32)
    for r in range(0, n, R):
        where = base + (r + row)[:, None] * n + column[None, :]
        mask = ((r + row)[:, None] < n) & (column[None, :] < n)
        q = tl.load(q_ptr + where, mask=mask, other=0.0)
        lam += tl.sum(q * tl.load(aq_ptr + where, mask=mask, other=0.0), axis=0)
    off = tl.zeros((C,), tl.float32)
    norm = tl.zeros((C,), tl.float32)
    for r in range(0, n, R):
        where = base + (r + row)[:, None] * n + column[None, :]
        mask = ((r + row)[:, None] < n) & (column[None, :] < n)
        q = tl.load(q_ptr + where, mask=mask, other=0.0)
        d = (tl.load(aq_ptr + where, mask=mask, other=0.0) - q * lam[None, :]) * scale
        a = tl.load(a_ptr + where, mask=mask, other=0.0) * scale
        off += tl.sum(d * d, axis=0)
        norm += tl.sum(a * a, axis=0)
    tl.store(off_ptr + matrix * n + column, off, mask=column < n)
    tl.store(norm_ptr + matrix * n + column, norm, mask=column < n)


@triton.jit
def gather(addresses, pieces, tiles, buffer, row_absmax, SIZE: tl.constexpr, MEASURE: tl.constexpr):
    """Gradients into the buffer, and the absmax of its rows; see :mod:`.transfer`."""
    piece = pieces + tl.load(tiles + 2 * tl.program_id(0)) * 7
    k = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int32) + tl.arange(0, SIZE)
    run = tl.load(piece + 3).to(tl.int32)
    row = k // run
    mask = k < tl.load(piece + 5)
    source = tl.load(addresses + tl.load(piece)).to(tl.pointer_type(tl.float32))
    source += tl.load(piece + 1) + row * tl.load(piece + 4) + (k - row * run)
    x = tl.load(source, mask=mask, other=0.0)
    if MEASURE:
        absmax = tl.max(tl.abs(x).to(tl.int32, bitcast=True), 0)
        tl.atomic_max(row_absmax + tl.load(piece + 6), absmax)
    tl.store(buffer + tl.load(piece + 2) + k, x, mask=mask)


@triton.jit
def scatter(addresses, pieces, tiles, buffer, lr_ptr, weight_decay, bad, SIZE: tl.constexpr):
    """Update directions from the buffer into parameters but the bad ones, see :mod:`.transfer`."""
    piece = pieces + tl.load(tiles + 2 * tl.program_id(0)) * 7
    k = tl.load(tiles + 2 * tl.program_id(0) + 1).to(tl.int32) + tl.arange(0, SIZE)
    run = tl.load(piece + 3).to(tl.int32)
    row = k // run
    param = tl.load(piece)
    mask = k < tl.where(tl.load(bad + param) == 0, tl.load(piece + 5), 0)
    to = tl.load(addresses + param).to(tl.pointer_type(tl.float32))
    to += tl.load(piece + 1) + row * tl.load(piece + 4) + (k - row * run)
    lr = tl.load(lr_ptr)
    u = tl.load(buffer + tl.load(piece + 2) + k, mask=mask)
    p = tl.load(to, mask=mask)
    tl.store(to, p - lr * (u + weight_decay * p), mask=mask)
