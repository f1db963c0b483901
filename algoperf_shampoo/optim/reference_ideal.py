"""What the family approximates, for tensors so small that a [numel, numel] matrix is affordable.

In the style of :mod:`.reference`: one tensor, float64. g is G flattened row by row, as torch does
it, so that a Kronecker-factored matrix is A_1 (x) ... (x) A_k in the order of the modes. The paper
flattens by columns and writes R (x) L for the same matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from .reference import from_basis, matricize, to_basis


def kronecker(A: Sequence[Tensor]) -> Tensor:
    """A_1 (x) ... (x) A_k. [numel, numel]"""
    return reduce(torch.kron, [a.contiguous() for a in A])


def second_moment(gradients: Sequence[Tensor], beta2: float | None = None) -> Tensor:
    """E[gg']: the mean over gradients, or full-matrix Adam's A_T (EMA from zero, not corrected)."""
    A = torch.zeros(gradients[0].numel(), gradients[0].numel(), dtype=gradients[0].dtype)
    for G in gradients:
        g = G.flatten()
        if beta2 is None:
            A = A + torch.outer(g, g) / len(gradients)
        else:
            A = beta2 * A + (1 - beta2) * torch.outer(g, g)
    return A


def shampoo_factors(A: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """E of each matricization's Gram matrix, from E[gg']: E[GG'] and E[G'G] for matrices."""
    k = len(shape)
    whole = A.reshape(*shape, *shape)
    factors = []
    for i in range(k):
        rows, columns = list(range(k)), list(range(k))  # contract all modes but i
        columns[i] = k
        factors.append(torch.einsum(whole, rows + columns, [i, k]))
    return factors


def exact_correction(A: Tensor, Q: Sequence[Tensor]) -> Tensor:
    """D* of Eqs. 14, 23 and 25: the diagonal of Q' A Q, Q = Q_1 (x) ... (x) Q_k, shaped like G."""
    whole = kronecker(Q)
    return torch.diag(whole.T @ A @ whole).reshape([len(q) for q in Q])


def in_basis(D: Tensor, Q: Sequence[Tensor]) -> Tensor:
    """Q diag(vec D) Q'. [numel, numel]"""
    whole = kronecker(Q)
    return whole @ torch.diag(D.flatten()) @ whole.T


def update(D: Tensor, Q: Sequence[Tensor], G: Tensor, p: float) -> Tensor:
    """U of Lemma 1: Q_L (D^-p o (Q_L' G Q_R)) Q_R'."""
    return from_basis(D**-p * to_basis(G, Q), Q)


def power(A: Tensor, p: float) -> Tensor:
    """A^p of a symmetric positive definite matrix."""
    lam, Q = torch.linalg.eigh(A)
    return Q @ torch.diag(lam**p) @ Q.T


def kl_divergence(A: Tensor, S: Tensor) -> float:
    """KL(N(0, A), N(0, S)) = (Tr(S^-1 A) - log det(S^-1 A) - d) / 2, in nats."""
    X = torch.linalg.solve(S, A)
    log_det = torch.linalg.slogdet(A).logabsdet - torch.linalg.slogdet(S).logabsdet
    return (0.5 * (torch.trace(X) - log_det - len(A))).item()


def whitened_factor(A: Tensor, S: Sequence[Tensor], mode: int) -> Tensor:
    """KL-Shampoo's right side for one mode: for matrices E[G S2^-1 G'] / d2, from E[gg']."""
    shape = [len(s) for s in S]
    halves = [power(s, -0.5) if i != mode else torch.eye(len(s)).to(s) for i, s in enumerate(S)]
    H = kronecker(halves)
    return shampoo_factors(H @ A @ H, shape)[mode] * shape[mode] / len(A)


def flip_flop(A: Tensor, shape: Sequence[int], iterations: int = 500) -> list[Tensor]:
    """The Kronecker factors of least KL(N(0, A), N(0, S)): maximum likelihood for matrix Gaussians.

    Mode after mode takes its stationary value given the others (Dutilleul, 1999), until nothing
    moves. The scales of single factors are arbitrary, that of the product is not.

    Raises:
        RuntimeError: no convergence to 1e-12.
    """
    S = [torch.eye(d, dtype=A.dtype) for d in shape]
    for _ in range(iterations):
        before = kronecker(S)
        for i in range(len(shape)):
            S[i] = whitened_factor(A, S, i)
        if (kronecker(S) - before).norm() <= 1e-12 * before.norm():
            return S
    raise RuntimeError(f"no convergence in {iterations} iterations")


def moments_from_rows(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Mean of X X' per matricization X: Shampoo's factors by their definition."""
    return [
        sum((matricize(G, i) @ matricize(G, i).T for G in gradients), torch.zeros(()))
        / len(gradients)
        for i in range(gradients[0].ndim)
    ]
