"""Shampoo without an eigenvalue correction, as the paper prints it: one tensor, float64, loops.

In the style of :mod:`.reference`, which has Shampoo with grafting (Algorithm 3) and lists the
paper's misprints. One class holds
three variants of "Purifying Shampoo" (Eschenhagen et al., NeurIPS 2025), which differ in
exponent, scale and in when eigenvectors are computed:

* :func:`shampoo`: Eq. 5, exponent -1/(2k) per factor of a tensor of order k. No grafting.
* :func:`shampoo_adaptive`: the same, kept as eigenvectors and eigenvalues. At a check where Eq.
  11 holds, the eigenvectors stay and the eigenvalues become diag(Q'LQ) (appendix B, last
  paragraph).
* :func:`shampoo2_trace`: C = S^-1 (R (x) L), S = Tr(L) = Tr(R) (section 3), to the power -1/2.

What the paper leaves open, and is settled here:

* Before the first decomposition (step F) the factors' roots are identities, so U = M~, as in the
  authors' code.
* Order k. The paper defines S^-1 for matrices. All k factors have the trace S = E||G||^2, and for
  E[gg'] = A_1 (x) ... (x) A_k they are A_i S / Tr(A_i), so S^-(k-1) is what makes the product
  exact again: none for vectors. ``authors_scale`` divides every factor by sqrt(S) instead, as the
  authors' code does, which is S^-1/2 for vectors and S^-3/2 for order 3; for matrices the two are
  one.
* epsilon is added to a factor's eigenvalues after the scale.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .reference import (
    AdamW,
    Hyperparameters,
    from_basis,
    matricize,
    numerator,
    relative_off_diagonal,
)


def trace_exponent(order: int, authors_scale: bool = False) -> float:
    """s such that the scaled factor is L / Tr(L)^s: (k - 1)/k, or 1/2 in the authors' code."""
    return 0.5 if authors_scale else (order - 1) / order


def eigenvalues_in(L: Tensor, Q: Tensor) -> Tensor:
    """diag(Q'LQ): the Rayleigh quotients of L in the columns of Q. [d]"""
    return torch.diag(Q.T @ L @ Q)


def root_from(Q: Tensor, lam: Tensor, exponent: float, epsilon: float) -> Tensor:
    """Q diag(lambda)^-exponent Q', with lambda shifted by -min(lambda_min, 0) + epsilon.

    With epsilon = 0 as :func:`.reference.inverse_root`.
    """
    lam = lam - min(lam.min().item(), 0.0) + epsilon
    if epsilon == 0 and lam.max() == 0:
        return torch.eye(len(lam), dtype=Q.dtype)
    root = lam**-exponent
    if epsilon == 0:
        root[lam <= len(lam) * torch.finfo(Q.dtype).eps * lam.max()] = 0
    return Q @ torch.diag(root) @ Q.T


@dataclass
class Shampoo:
    """U = M~ preconditioned by one inverse root per factor; ``h.tau`` > 0 lets Eq. 11 decide.

    Args:
        h: hyperparameters; ``h.epsilon`` is added to the eigenvalues.
        squared: exponent 1/2 per factor (Shampoo^2) instead of 1/(2k).
        trace_scaled: factors scaled by S^-(k-1)/k.
        authors_scale: with ``trace_scaled``, by S^-1/2 whatever the order.
        grafting_epsilon: graft the norm of Adam with this epsilon (Eq. 7), and Adam itself before
            the first roots; None: no grafting.
    """

    h: Hyperparameters
    squared: bool = False
    trace_scaled: bool = False
    authors_scale: bool = False
    grafting_epsilon: float | None = None
    t: int = 0
    M: Tensor | None = None
    adam: AdamW | None = None
    factors: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    eigenvalues: list[Tensor] = field(default_factory=list)
    refreshed: list[bool] = field(default_factory=list)  # of the last step, per factor

    def scaled(self, L: Tensor) -> Tensor:
        """The factor a decomposition sees: bias-corrected, and divided by a power of its trace."""
        L = L / (1 - self.h.beta2**self.t)
        if not self.trace_scaled:
            return L
        S = max(torch.trace(L).item(), self.h.epsilon)
        return L / S ** trace_exponent(len(self.factors), self.authors_scale)

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        h = self.h
        if self.M is None:
            self.M = torch.zeros_like(G)
            self.factors = [torch.zeros(d, d, dtype=G.dtype) for d in G.shape]
            self.bases = [torch.eye(d, dtype=G.dtype) for d in G.shape]
        self.t += 1
        self.M = h.beta1 * self.M + (1 - h.beta1) * G
        for i, L in enumerate(self.factors):  # Eqs. 3 and 4
            X = matricize(G, i)
            self.factors[i] = h.beta2 * L + (1 - h.beta2) * X @ X.T
        self.refreshed = [False] * G.ndim
        if self.t % h.F == 0:
            self.refresh()
        U = numerator(self.M, G, h, self.t)
        if self.eigenvalues:
            exponent = 0.5 if self.squared else 1 / (2 * G.ndim)
            pairs = zip(self.bases, self.eigenvalues, strict=True)
            U = from_basis(U, [root_from(Q, lam, exponent, h.epsilon) for Q, lam in pairs])
        if self.grafting_epsilon is not None:
            if self.adam is None:
                self.adam = AdamW(replace(h, epsilon=self.grafting_epsilon))
            A = self.adam.direction(G)
            U = U * (A.norm() / (U.norm() + 1e-16)) if self.eigenvalues else A
        return W - h.alpha * (U + h.weight_decay * W)

    def refresh(self) -> None:
        """Eigenvalues of every factor, and eigenvectors where Eq. 11 fails (all with tau = 0)."""
        eigenvalues = []
        for i, L in enumerate(self.factors):
            A, Q = self.scaled(L), self.bases[i]
            if self.h.tau > 0 and relative_off_diagonal(A, Q) <= self.h.tau:
                eigenvalues.append(eigenvalues_in(A, Q))
            else:
                lam, self.bases[i] = torch.linalg.eigh(A)
                eigenvalues.append(lam)
                self.refreshed[i] = True
        self.eigenvalues = eigenvalues


def shampoo(h: Hyperparameters) -> Shampoo:
    """Shampoo without grafting: a decomposition of every factor every F steps, ``h.tau`` = 0.

    Raises:
        ValueError: ``h.tau`` is not 0; :func:`shampoo_adaptive` is the variant with a threshold.
    """
    if h.tau != 0:
        raise ValueError(f"shampoo has no threshold: tau must be 0, got {h.tau!r}")
    return Shampoo(h)


def shampoo_adaptive(h: Hyperparameters) -> Shampoo:
    """Shampoo whose eigenvectors are recomputed where Eq. 11 fails, eigenvalues at every check.

    Raises:
        ValueError: ``h.tau`` is not positive.
    """
    if not h.tau > 0:
        raise ValueError(f"shampoo_adaptive needs a threshold: tau must be > 0, got {h.tau!r}")
    return Shampoo(h)


def shampoo2_trace(h: Hyperparameters, authors_scale: bool = False) -> Shampoo:
    """S^-1 C^Shampoo2, without grafting; with ``h.tau`` > 0 Eq. 11 decides on eigenvectors."""
    return Shampoo(h, squared=True, trace_scaled=True, authors_scale=authors_scale)
