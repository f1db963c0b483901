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
    shift = shift_(scaled)
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
    if shift:
        values.sub_(shift)
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


def shift_(scaled: Tensor) -> float:
    """On a GPU, adds a multiple of the identity to matrices divided by :func:`scale_of`; it returns
    what their eigenvalues are to be reduced by.

    Of a matrix of low rank (which factors of real gradients are) cuSOLVER's float32 solvers return
    vectors that are not orthogonal in the null space, ||Q'Q - I|| / sqrt(n) up to 1.1
    (2.3 by torch.linalg.eigh there), and call that converged (CUDA 13). Presumably numbers of 1e-20
    stand off the diagonal of the tridiagonal form beside eigenvalues as small, and their squares
    underflow; beside a shift of 8 eps they count as zero. With it 2e-6 is left, and a shift is no
    more than a solver's own error in the eigenvalues.
    """
    if not scaled.is_cuda:
        return 0.0
    shift = 8 * torch.finfo(scaled.dtype).eps
    scaled.diagonal(dim1=-2, dim2=-1).add_(shift)
    return shift


def by_lapack(problem: Problem) -> Result:
    """In float64 on the CPU, one matrix at a time: what every other means has failed at."""
    result = Result.empty(problem)
    for p, i in enumerate(problem.indices):
        a = problem.factors[i : i + 1]
        values, vectors, converged = torch.zeros_like(a[..., 0]), torch.empty_like(a), [False]
        mend(a, [0], values, vectors, converged)
        problem.operators[i].copy_(vectors[0])
        result.put([p], Result(values * scale_of(a)[:, None], converged))
    return result


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
