"""Eq. 11: when a stale eigenbasis is good enough. The formula, and the decision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .blocks.factors import FactorSet
from .blocks.rows import chunks, take
from .gpu import triton_kernels
from .journal import Run, directly_run
from .ops.linalg import largest_entry, matmul_precision


def relative_off_diagonal(a: Tensor, q: Tensor) -> Tensor:
    """Left side of Eq. 11, ||Q'AQ - diag(Q'AQ)||_F / ||A||_F, for stacks: [N, n, n] x2 -> [N];
    :func:`.refresh.refresh` compares it with tau. ||Q'AQ||_F = ||A||_F for orthogonal Q.

    Uses ||Q'AQ - Lambda|| = ||AQ - Q Lambda|| with Lambda = diag(Q'AQ): one product instead of two,
    and no difference of two large norms (sqrt(|B|^2 - |diag B|^2) reads 0 for a true 1e-3 in
    float32). Entries are divided by the largest first, so that tiny gradients do not underflow when
    squared. 0 for an all-zero factor, nan for one that is not finite.

    No eps * I is added to the factor (facebookresearch/optimizers does): with small gradients eps
    would dominate, the criterion would always hold and the basis would never move.
    """
    scale = largest_entry(a)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    off, norm = off_diagonal_and_norm(a, q, a @ q, scale)
    return torch.where(norm > 0, off / norm, norm)


def off_diagonal_and_norm(a: Tensor, q: Tensor, aq: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """||AQ - Q diag(Q'AQ)||_F / scale and ||A||_F / scale of stacks: two tensors [N].

    a, q, aq = a @ q: [N, n, n], aq may be overwritten; scale: [N]. On a GPU our kernel passes over
    memory 5 times, torch's operations 14 times.
    """
    contiguous = a.is_contiguous() and q.is_contiguous() and aq.is_contiguous()
    fits = a.is_cuda and a.dtype == torch.float32 and contiguous
    if fits and (module := triton_kernels()) is not None:
        n = a.shape[-1]
        off, norm = a.new_empty(2, len(a), n)
        with torch.cuda.device(a.device):
            grid = (len(a), (n + 31) // 32)
            module.criterion[grid](a, q, aq, scale.contiguous(), off, norm, n, R=64, C=32)
        return off.sum(-1).sqrt(), norm.sum(-1).sqrt()
    rayleigh = (q * aq).sum(-2, keepdim=True)  # [N, 1, n]
    scale = scale[:, None, None]
    off = torch.linalg.vector_norm(aq.sub_(q * rayleigh).div_(scale), dim=(-2, -1))
    return off, torch.linalg.vector_norm(a / scale, dim=(-2, -1))


@torch.no_grad()
def scores(factor_set: FactorSet, indices: Sequence[int], tau: float) -> Tensor:
    """Per factor, a number that exceeds tau when it needs a new operator: [len(indices)], float64.

    With tau > 0 the left side of Eq. 11. With tau = 0 (fixed frequency) infinity. Never for a
    factor that is all zero (no direction to prefer) or not finite (nan compares false).
    """
    parts = []
    for chunk in chunks(indices, factor_set.n):
        a = take(factor_set.factors, chunk)
        if tau > 0:
            with matmul_precision("highest"):
                part = relative_off_diagonal(a, take(factor_set.operators, chunk))
        else:
            largest = largest_entry(a)
            part = torch.where(largest > 0, largest + math.inf, largest)
            part = torch.where(torch.isfinite(largest), part, torch.full_like(part, math.nan))
        parts.append(part.double())
    return torch.cat(parts)


def read_scores(
    factor_sets: Sequence[FactorSet],
    due: Sequence[tuple[FactorSet, list[int]]],
    tau: float,
    group: dist.ProcessGroup | None,
    run: Run,
) -> list[float]:
    """:func:`scores` of all that is due, in order, by the one host read; rank 0's in a group."""
    device = max((s.factors.device for s, _ in due), key=str)
    everything = sum(len(i) for _, i in due) == sum(len(s.factors) for s in factor_sets)
    values = (run if everything else directly_run)(
        "scores" if tau > 0 else "finite",
        lambda: torch.cat([scores(s, i, tau).to(device) for s, i in due]),
    )
    if group is not None:
        dist.broadcast(values, src=dist.get_global_rank(group, 0), group=group)
    return values.tolist()
