"""GPU kernels where torch operations would pass over memory many times, or compute twice as much.

They need Triton, which torch's Linux CUDA wheels bring along; without it the same arithmetic runs
as torch operations (22 passes over memory instead of 6 for Adam, 14 instead of 5 for the
criterion, and all of a symmetric product instead of half).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _kernels() -> Any:
    """(adam, criterion, gram), or None where Triton is missing; compiled at their first launch."""
    try:
        import triton
        from triton import language as tl
    except ImportError:
        return None

    @triton.jit
    def adam(  # type: ignore[no-untyped-def]
        g_ptr, m_ptr, v_ptr, c1_ptr, c2_ptr, n, b1, b2, eps, NADAM: tl.constexpr
    ):
        offsets = tl.program_id(0).to(tl.int64) * 1024 + tl.arange(0, 1024)
        mask = offsets < n
        g = tl.load(g_ptr + offsets, mask=mask)
        m = tl.load(m_ptr + offsets, mask=mask)
        v = tl.load(v_ptr + offsets, mask=mask)
        m += (g - m) * (1 - b1)
        v = v * b2 + g * g * (1 - b2)
        u = g + (m - g) * b1 if NADAM else m
        u /= (tl.sqrt(v) / tl.sqrt(tl.load(c2_ptr)) + eps) * tl.load(c1_ptr)
        tl.store(g_ptr + offsets, u, mask=mask)
        tl.store(m_ptr + offsets, m, mask=mask)
        tl.store(v_ptr + offsets, v, mask=mask)

    @triton.jit
    def criterion(  # type: ignore[no-untyped-def]
        a_ptr, q_ptr, aq_ptr, scale_ptr, off_ptr, norm_ptr, n, R: tl.constexpr, C: tl.constexpr
    ):
        # One program per matrix and C of its columns; rows in tiles of R.
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
    def gram(  # type: ignore[no-untyped-def]
        x_ptr, f_ptr, beta, weight, d, length, x_b, x_d, x_k, S: tl.constexpr, K: tl.constexpr
    ):
        # One program per matrix and tile (i, j <= i) of its lower triangle, mirrored to the upper.
        tile = tl.program_id(0)
        i = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
        i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
        j = tile - i * (i + 1) // 2
        matrix = tl.program_id(1).to(tl.int64)
        row, column = i * S + tl.arange(0, S), j * S + tl.arange(0, S)
        x = x_ptr + matrix * x_b
        total = tl.zeros((S, S), tl.float32)
        for start in range(0, length, K):
            k = start + tl.arange(0, K)
            a = tl.load(
                x + row[:, None] * x_d + k[None, :] * x_k,
                mask=(row[:, None] < d) & (k[None, :] < length),
                other=0.0,
            )
            b = tl.load(
                x + column[None, :] * x_d + k[:, None] * x_k,
                mask=(column[None, :] < d) & (k[:, None] < length),
                other=0.0,
            )
            total = tl.dot(a, b, total, input_precision="tf32x3")
        f = f_ptr + matrix * d * d
        mask = (row[:, None] < d) & (column[None, :] < d)
        old = tl.load(f + row[:, None] * d + column[None, :], mask=mask, other=0.0)
        new = old * beta + total * weight
        tl.store(f + row[:, None] * d + column[None, :], new, mask=mask)
        if i != j:
            tl.store(f + row[:, None] + column[None, :] * d, new, mask=mask)

    return adam, criterion, gram


GRAM_TILE = 64
# With fewer programs most of a GPU is idle, and cuBLAS, which cuts long sums in pieces, is faster.
GRAM_PROGRAMS = 96


def gram_ema_(factor: Tensor, rows: Tensor, beta: float, weight: float) -> bool:
    """factor <- beta * factor + weight * rows' rows; False, and nothing done, where cuBLAS is for
    it.

    factor: [B, d, d], contiguous and symmetric; rows: [B, k, d], contiguous or the transpose of
    such. Only one triangle is computed, on tensor cores as three TF32 products per float32 one: the
    error, 1.5e-7 relative, is half of cuBLAS's in float32.
    """
    if not (rows.is_cuda and rows.dtype == torch.float32 and factor.is_contiguous()):
        return False
    B, length, d = rows.shape
    side = -(-d // GRAM_TILE)
    tiles = side * (side + 1) // 2
    # Indices within a matrix are 32 bits wide.
    if B * tiles < GRAM_PROGRAMS or length * d >= 2**31:
        return False
    if torch.cuda.get_device_capability(rows.device) < (8, 0) or (kernels := _kernels()) is None:
        return False
    x_b, x_k, x_d = rows.stride()
    settings = dict(S=GRAM_TILE, K=32, num_warps=4, num_stages=3)
    with torch.cuda.device(rows.device):
        kernels[2][(tiles, B)](rows, factor, beta, weight, d, length, x_b, x_d, x_k, **settings)
    return True


def off_diagonal_and_norm(a: Tensor, q: Tensor, aq: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """||AQ - Q diag(Q'AQ)||_F / scale and ||A||_F / scale of stacks: two tensors [N].

    a, q, aq = a @ q: [N, n, n], aq may be overwritten; scale: [N].
    """
    contiguous = a.is_contiguous() and q.is_contiguous() and aq.is_contiguous()
    fits = a.is_cuda and a.dtype == torch.float32 and contiguous
    if fits and (kernels := _kernels()) is not None:
        n = a.shape[-1]
        off, norm = a.new_empty(2, len(a), n)
        with torch.cuda.device(a.device):
            grid = (len(a), (n + 31) // 32)
            kernels[1][grid](a, q, aq, scale.contiguous(), off, norm, n, R=64, C=32)
        return off.sum(-1).sqrt(), norm.sum(-1).sqrt()
    rayleigh = (q * aq).sum(-2, keepdim=True)  # [N, 1, n]
    scale = scale[:, None, None]
    off = torch.linalg.vector_norm(aq.sub_(q * rayleigh).div_(scale), dim=(-2, -1))
    return off, torch.linalg.vector_norm(a / scale, dim=(-2, -1))


def adam_(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    c1: float | Tensor,
    c2: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    nadam: bool,
) -> None:
    """Update both moments and replace g by Adam's direction (NAdam's numerator with ``nadam``).

    g, m, v: contiguous, one shape [B, ...] and dtype. c1, c2 = 1 - beta1^t, 1 - beta2^t: numbers,
    tensors with one entry on g's device, or [B, 1, ..., 1]. The torch path has torch.optim.AdamW's
    order of operations, so that the two agree to rounding.
    """
    scalars = isinstance(c1, Tensor) and c1.ndim == 0
    if g.is_cuda and scalars and g.dtype == torch.float32 and (kernels := _kernels()) is not None:
        grid = ((g.numel() + 1023) // 1024,)
        with torch.cuda.device(g.device):
            kernels[0][grid](g, m, v, c1, c2, g.numel(), beta1, beta2, eps, NADAM=nadam)
        return
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    m.lerp_(g, 1 - beta1)
    numerator = g.lerp_(m, beta1) if nadam else m
    root = c2.sqrt() if isinstance(c2, Tensor) else c2**0.5
    denominator = v.sqrt().div_(root).add_(eps).mul_(c1)
    torch.div(numerator, denominator, out=g)
