"""GPU kernels for the two places where torch operations would pass over memory many times.

They need Triton, which torch's Linux CUDA wheels bring along; without it the same arithmetic runs
as torch operations (22 passes over memory instead of 6 for Adam, 14 instead of 5 for the
criterion).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _kernels() -> Any:
    """(adam, criterion), or None where Triton is missing. They compile at their first launch."""
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

    return adam, criterion


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
