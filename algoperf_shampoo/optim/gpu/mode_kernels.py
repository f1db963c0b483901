"""GPU kernels (Triton) for vectors of modes: what KL-Shampoo does with its eigenvalues. Tables as
in :mod:`.kernels`."""

# No `from __future__ import annotations`: Triton reads the annotations.

import triton
from triton import language as tl

from .kernels import WORDS, _float_pointer, _load_of_row, _mark, _raise_top

TINY = tl.constexpr(2.0**-126)
FIRST, LAST, BETWEEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _vector(word, row, d):
    """The vector [d] of a row, given the address of all rows' in a table."""
    return tl.load(word).to(tl.pointer_type(tl.float32)) + row * d


@triton.jit
def _inverse_sqrt(lam, limit):
    """lambda^-1/2, at most limit; 0 where lambda is 0."""
    root = tl.minimum(1.0 / tl.sqrt(tl.maximum(lam, TINY)), limit)
    return tl.where(lam > 0, root, 0.0)


@triton.jit
def _product_of_modes(word, row, k, ORDER: tl.constexpr):
    """The product of the entries of ORDER modes' vectors that belong to entries k of a block, or of
    a part of its modes. Per mode in the table: vectors, their size d, entries after the mode."""
    s = tl.full(k.shape, 1.0, tl.float32)
    for mode in tl.static_range(ORDER):
        d = tl.load(word + 3 * mode + 1).to(tl.int32)
        post = tl.load(word + 3 * mode + 2).to(tl.int32)
        s *= tl.load(_vector(word + 3 * mode, row, d) + k // post % d)
    return s


@triton.jit
def inverse_sqrts(groups, tiles, SIZE: tl.constexpr, ALIGN: tl.constexpr):
    """lambda^-1/2, and the absmax of every row. Group: lambda, result, absmax, d, limit (the bits
    of a float32). Tile: group, row, first entry."""
    tile = tiles + tl.program_id(0) * 4
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    d = tl.load(group + 3).to(tl.int32)
    limit = tl.load(group + 4).to(tl.int32).to(tl.float32, bitcast=True)
    k = tl.load(tile + 2) + tl.arange(0, SIZE)
    lam = tl.load(_vector(group, row, d) + k, mask=k < d, other=0.0)
    root = _inverse_sqrt(lam, limit)
    _raise_top(group + 2, row, root[None, :])
    tl.store(_vector(group + 1, row, d) + k, root, mask=k < d)


@triton.jit
def scales(groups, tiles, ORDER: tl.constexpr, SIZE: tl.constexpr, ALIGN: tl.constexpr):
    """The products of the entries of some modes' vectors. Group: result [rows, size], its absmax,
    size, then per mode as :func:`_product_of_modes`. Tile: group, row, first entry."""
    tile = tiles + tl.program_id(0) * 4
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    size = tl.load(group + 2).to(tl.int32)
    k = tl.load(tile + 2) + tl.arange(0, SIZE)
    s = _product_of_modes(group + 3, row, k, ORDER)
    s = tl.where(k < size, s, 0.0)
    _raise_top(group + 1, row, s[None, :])
    tl.store(_vector(group, row, size) + k, s, mask=k < size)


@triton.jit
def squares(
    groups,
    tiles,
    partial_ptr,
    WHERE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Sums of (x s)^2 over a part of all modes but one: to ``partial_ptr`` [tiles, BN].

    x: [rows, pre, d, post], the mode FIRST (pre = 1), LAST (post = 1) or BETWEEN. Group: x, d,
    post, K = pre post, scales s [rows, K]. Tile: group, row, first of the mode's entries, -, first
    k, last k + 1.
    """
    tile = tiles + tl.program_id(0) * 6
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    n = tl.multiple_of(tl.load(tile + 2), 16) + tl.arange(0, BN)
    d = tl.multiple_of(tl.load(group + 1).to(tl.int32), ALIGN if WHERE == LAST else 1)
    post = tl.multiple_of(tl.load(group + 2).to(tl.int32), ALIGN if WHERE == FIRST else 1)
    K = tl.load(group + 3).to(tl.int32)
    x_ptr = _float_pointer(group) + row * d * K
    s_ptr = _vector(group + 4, row, K)
    first = tl.multiple_of(tl.load(tile + 4), 16)
    last = tl.load(tile + 5)
    if WHERE == LAST:
        total = tl.zeros((BK, BN), tl.float32)
    else:
        total = tl.zeros((BN, BK), tl.float32)
    for start in range(first, last, BK):
        k = start + tl.arange(0, BK)
        s = tl.load(s_ptr + k, mask=k < last, other=0.0)
        if WHERE == LAST:
            mask = (k[:, None] < last) & (n[None, :] < d)
            x = tl.load(x_ptr + k[:, None] * d + n[None, :], mask=mask, other=0.0) * s[:, None]
        else:
            mask = (k[None, :] < last) & (n[:, None] < d)
            if WHERE == FIRST:
                where = n[:, None] * post + k[None, :]
            else:
                outside = k // post * post
                where = outside[None, :] * d + n[:, None] * post + (k - outside)[None, :]
            x = tl.load(x_ptr + where, mask=mask, other=0.0) * s[None, :]
        total += x * x
    total = tl.sum(total, 0 if WHERE == LAST else 1)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN), total)


@triton.jit
def eigenvalues(groups, tiles, partial_ptr, beta, rest, BN: tl.constexpr):
    """lambda <- beta lambda + rest (mean of squares), its inverse root within the limit; rows that
    are bad keep theirs.

    The sums come in pieces of :func:`squares`, in their order. Group: lambda, d, K, limit (the bits
    of a float32), marks of bad rows. Tile: group, row, first entry, -, first piece, last piece + 1.
    """
    tile = tiles + tl.program_id(0) * 6
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    d = tl.load(group + 1).to(tl.int32)
    K = tl.load(group + 2).to(tl.float32)
    limit = tl.load(group + 3).to(tl.int32).to(tl.float32, bitcast=True)
    inside = tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    first = tl.load(tile + 4)
    partial = partial_ptr + first.to(tl.int64) * BN + inside
    for _ in range(first, tl.load(tile + 5)):
        total += tl.load(partial)
        partial += BN
    n = tl.load(tile + 2) + inside
    mask = n < tl.where(_mark(group + 4, row) == 0, d, 0)
    where = _vector(group, row, d) + n
    lam = tl.load(where, mask=mask, other=1.0)
    root = _inverse_sqrt(beta * lam + rest * (total / K), limit)
    bounded = tl.where(root > 0, tl.maximum(root, 2.0**-63), 1.0)
    tl.store(where, tl.where(root > 0, 1.0 / (bounded * bounded), 0.0), mask=mask)


@triton.jit
def momentum(
    groups,
    tiles,
    rest1,
    eps,
    ORDER: tl.constexpr,
    LEARNS: tl.constexpr,
    SIZE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The moment m learns x, and x <- factor m s / (1 + eps s), s the product of the entries of the
    modes' vectors; without LEARNS x itself stands for m.

    Group: x, m, absmax of the result, entries a row, marks of bad rows, which keep their moment and
    get 0, factors (one a row), then per mode as :func:`_product_of_modes`. Tile: group, row, first
    entry.
    """
    tile = tiles + tl.program_id(0) * 4
    group = groups + tl.load(tile) * WORDS
    row = tl.load(tile + 1).to(tl.int64)
    size = tl.multiple_of(tl.load(group + 3).to(tl.int32), ALIGN)
    k = tl.multiple_of(tl.load(tile + 2), 16) + tl.arange(0, SIZE)
    mask = k < size
    x_ptr = _float_pointer(group) + row * size + k
    x = tl.load(x_ptr, mask=mask, other=0.0)
    s = _product_of_modes(group + 6, row, k, ORDER)
    factor = _load_of_row(group + 5, row)
    if LEARNS:
        m_ptr = _float_pointer(group + 1) + row * size + k
        m = tl.load(m_ptr, mask=mask, other=0.0)
        m += (x - m) * rest1
        learns = k < tl.where(_mark(group + 4, row) == 0, size, 0)
        tl.store(m_ptr, m, mask=learns)
        u = tl.where(learns, m * s / (1 + eps * s) * factor, 0.0)
    else:
        u = tl.where(mask, x * s * factor, 0.0)
    _raise_top(group + 2, row, u[None, :])
    tl.store(x_ptr, u, mask=mask)
