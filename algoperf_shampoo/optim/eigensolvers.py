"""Eigendecompositions of stacks of symmetric matrices: the back ends, and the rule that picks one."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Stacks are decomposed in chunks of at most this many matrix entries, so that the workspace of a
# refresh stays bounded whatever the model (2^24 entries = 64 MiB in float32).
CHUNK_ENTRIES = 2**24


@dataclass(frozen=True)
class Solver:
    """Computes eigenvalues and eigenvectors of stacks, one matrix's failure sparing the others."""

    method: str = "eigh"

    def solve(self, a: Tensor, old: Tensor, tau: float) -> tuple[Tensor, Tensor, list[bool]]:
        """Ascending eigenvalues [N, n], eigenvectors [N, n, n] as columns, and who converged.

        Args:
            a: symmetric positive semi-definite [N, n, n], finite.
            old: the operators in use, [N, n, n]; a warm start for iterative methods.
            tau: tolerance of Eq. 11 for iterative methods.
        """
        try:
            values, vectors = eigh(a)
        except torch.linalg.LinAlgError:
            return _one_by_one(a)
        return values, vectors, torch.isfinite(vectors).all(-1).all(-1).tolist()


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """torch.linalg.eigh of [N, n, n], each matrix scaled by its largest entry first.

    Float32 gradients of 1e-12 give factors of 1e-24, whose squares inside a solver underflow.
    """
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1)
    values, vectors = torch.linalg.eigh(a / scale[:, None, None])
    return values * scale[:, None], vectors


def _one_by_one(a: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    """After a batch failed: each matrix alone, in float64 on the CPU."""
    values = torch.zeros_like(a[..., 0])
    vectors = torch.zeros_like(a)
    converged = []
    for i, matrix in enumerate(a.double().cpu()):
        try:
            lam, q = eigh(matrix[None])
        except torch.linalg.LinAlgError as error:
            log.warning("a factor of size %d has no eigendecomposition: %s", a.shape[-1], error)
            converged.append(False)
            continue
        values[i].copy_(lam[0])
        vectors[i].copy_(q[0])
        converged.append(True)
    return values, vectors, converged
