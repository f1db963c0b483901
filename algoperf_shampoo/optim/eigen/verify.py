"""Whether what a solver returned is an eigendecomposition, before anything is built on it.

By a few random vectors z: an error matrix E has E||E z||^2 = ||E||_F^2 for signs z, so that some
products [n, n] x [n, 8] see what would otherwise take several of [n, n] x [n, n]. That is a small
part of what a check of Eq. 11 takes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks.rows import chunks, take
from ..ops.linalg import largest_entry, matmul_precision

PROBES = 8
# Of ||Q Q' - I|| / sqrt(n), and of ||A - Q Lambda Q'|| / ||A|| beyond what the method leaves.
# Solvers leave 1e-6 to 1e-5; what cuSOLVER gets wrong (:func:`.exact.shift_`) starts at 1e-2.
TOLERANCE = 1e-2
# An estimate from eight vectors exceeds three times the true value once in 10^11.
MARGIN = 3.0


@torch.no_grad()
def sound(
    factors: Tensor, operators: Tensor, indices: Sequence[int], values: Tensor, promised: float
) -> Tensor:
    """Per index, whether Q = operators[i] and Lambda = values[p] decompose A = factors[i]: bool
    [len(indices)].

    Args:
        factors, operators: [N, n, n].
        values: [len(indices), n].
        promised: the relative residual that the method stops at, 0 if it is exact.
    """
    n = factors.shape[-1]
    z = _probes(n, factors.dtype, factors.device)
    limit = TOLERANCE + MARGIN * promised
    parts, start = [], 0
    for chunk in chunks(indices, n):
        a, q = take(factors, chunk), take(operators, chunk)
        # Squares of a tiny factor's entries would underflow.
        scale = largest_entry(a)[:, None, None]
        lam = values[start : start + len(chunk), :, None] / scale
        start += len(chunk)
        with matmul_precision("highest"):
            az = (a @ z).div_(scale)
            w = q.mT @ z
            back = q @ torch.cat([w, lam * w], -1)
        unlike = torch.linalg.vector_norm(back[..., :PROBES] - z, dim=(1, 2)) / (n * PROBES) ** 0.5
        off = torch.linalg.vector_norm(back[..., PROBES:] - az, dim=(1, 2))
        norm = torch.linalg.vector_norm(az, dim=(1, 2))
        parts.append((unlike <= TOLERANCE) & (off <= limit * norm))
    return torch.cat(parts)


@functools.lru_cache(maxsize=64)
def _probes(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Signs [n, PROBES], always the same ones."""
    generator = torch.Generator().manual_seed(n)
    signs = torch.randint(0, 2, (n, PROBES), generator=generator)
    return (2 * signs - 1).to(dtype).to(device)
