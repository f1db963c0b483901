"""Simultaneous iteration from the old basis by Householder QR: Algorithm 4, and SOAP's single step.

Q <- QR(A Q) is the paper's QR(Q'AQ) times Q. Columns move towards descending eigenvalues, so that
is the order to have them in; a basis that is sorted so beforehand says how its columns moved.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks.rows import put, take
from ..criterion import relative_off_diagonal
from ..ops.linalg import largest_entry, matmul_precision
from .problem import Problem, Result


def iterate(problem: Problem, tau: float, iterations: int, sort: bool, limit: int) -> Result:
    """At most so many iterations of each basis: one at least, and on while Eq. 11 exceeds tau.

    Args:
        tau: threshold of Eq. 11; 0: all iterations, whatever it says.
        sort: whether columns are first put in the order of diag(Q'AQ), descending.
        limit: bytes of memory to take, if two matrices can be worked on within.

    Returns:
        diag(Q'AQ) as values; as permutation where each column came from, with ``sort``.
    """
    n = problem.n
    size = max(1, limit // (6 * n * n * problem.factors.dtype.itemsize))
    values, permutations, converged = [], [], []
    for start in range(0, len(problem.indices), size):
        indices = problem.indices[start : start + size]
        with matmul_precision("highest"):
            a, q = take(problem.factors, indices), take(problem.operators, indices)
            # Tiny factors would underflow when squared.
            scale = largest_entry(a).clamp_min(torch.finfo(a.dtype).tiny)
            a = a / scale[:, None, None]
            if sort:
                order = _rayleigh(a, q).argsort(dim=-1, descending=True, stable=True)
                permutations.append(order)
                q = torch.gather(q, -1, order[:, None, :].expand_as(q))
            q = _iterated(a, q, tau, iterations)
            values.append(_rayleigh(a, q) * scale[:, None])
        converged += torch.isfinite(q).all(-1).all(-1).tolist()
        put(problem.operators, indices, q)
    return Result(torch.cat(values), converged, torch.cat(permutations) if sort else None)


def _rayleigh(a: Tensor, q: Tensor) -> Tensor:
    """diag(Q'AQ): [N, n, n] x 2 -> [N, n]."""
    return (q * (a @ q)).sum(-2)


def _iterated(a: Tensor, q: Tensor, tau: float, iterations: int) -> Tensor:
    left = torch.arange(len(a), device=a.device)
    for number in range(iterations):
        if number and tau > 0:
            left = left[relative_off_diagonal(a[left], q[left]) > tau]
            if not len(left):
                break
        some = torch.linalg.qr(a[left] @ q[left]).Q
        q = some if len(left) == len(q) else q.index_copy(0, left, some)
    return q
