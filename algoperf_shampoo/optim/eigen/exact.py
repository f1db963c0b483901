"""Exact eigendecompositions without planning: few matrices, no cuSOLVER, or cuSOLVER failed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks.rows import put, take
from . import cusolver
from .problem import Problem, Result

log = logging.getLogger(__name__)


def exact(a: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    """Eigenvalues [N, n], vectors [N, n, n] and who converged, of a few matrices of one size."""
    scaled, scale = _scaled(a)
    if a.is_cuda and cusolver.available():
        vectors, work = scaled, cusolver.workspace(a.shape[-1], a.dtype, a.device, len(a))
        values, converged = cusolver.eigh_(vectors, work)
    else:
        try:
            values, vectors = torch.linalg.eigh(scaled)
        except torch.linalg.LinAlgError:
            values, vectors, converged = _one_by_one(scaled)
        else:
            converged = torch.isfinite(vectors).all(-1).all(-1).tolist()
    mend(a, range(len(a)), values, vectors, converged)
    return values * scale[:, None], vectors, converged


def decompose(problem: Problem, limit: int) -> Result:
    """:func:`exact`, by pieces that take ``limit`` bytes, or by single matrices."""
    n, itemsize = problem.n, problem.factors.dtype.itemsize
    size = max(1, limit // (4 * n * n * itemsize))
    result = Result.empty(problem)
    for start in range(0, len(problem.indices), size):
        positions = range(start, min(start + size, len(problem.indices)))
        part = problem.part(positions)
        values, vectors, converged = exact(take(part.factors, part.indices))
        put(part.operators, part.indices, vectors)
        result.put(positions, Result(values, converged))
    return result


def scale_of(a: Tensor) -> Tensor:
    """What matrices are divided by before a solver sees them: [N, n, n] -> [N], their largest
    entries.

    Float32 gradients of 1e-12 give factors of 1e-24, whose squares inside a solver underflow.
    """
    return a.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(a.dtype).tiny)


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    scale = scale_of(a)
    return a / scale[:, None, None], scale


def mend(
    factors: Tensor,
    indices: Sequence[int],
    values: Tensor,
    vectors: Tensor,
    converged: list[bool],
) -> None:
    """Decompose again, by other means, what did not converge.

    factors: [.., n, n], intact; values [N, n], vectors [N, n, n] and converged are of
    factors[indices] divided by :func:`scale_of`, and updated.
    """
    failed = [p for p, ok in enumerate(converged) if not ok]
    if failed:
        a, _ = _scaled(take(factors, [indices[p] for p in failed]))
        lam, q, again = _one_by_one(a)
        put(values, failed, lam)
        put(vectors, failed, q)
        for p, ok in zip(failed, again, strict=True):
            converged[p] = ok


def _one_by_one(a: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    """Each matrix alone, in float64 on the CPU; I where that fails too."""
    values = torch.zeros_like(a[..., 0])
    vectors = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).repeat(len(a), 1, 1)
    converged = []
    for i, matrix in enumerate(a.double().cpu()):
        try:
            lam, q = torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError as error:
            log.warning("a factor of size %d has no eigendecomposition: %s", a.shape[-1], error)
            converged.append(False)
            continue
        if not torch.isfinite(q).all():
            converged.append(False)
            continue
        values[i].copy_(lam)
        vectors[i].copy_(q)
        converged.append(True)
    return values, vectors, converged
