"""SOAP as its authors run it: one tensor, float64, loops.

In the style of :mod:`.reference`. Source: the authors' code (nikhilvyas/SOAP at a1e55353). M is
the EMA of the *rotated* gradient there, where Algorithm 3 of Vyas et al., "SOAP" (2025) has the
gradient; because M is taken along, by way of the parameters' coordinates, whenever the basis
changes, the two are one by linearity: the discrepancy that appendix B of "Purifying Shampoo" notes
is one of notation. Against EShampoo (Algorithm 2 of "Purifying Shampoo"):

* The first call only starts the factors and their eigenvectors; it updates nothing and does not
  count.
* Statistics follow the update: a gradient is preconditioned with the basis of the steps before
  it.
* One simultaneous iteration, QR(LQ), every F steps, its columns sorted by diag(Q'LQ), descending,
  beforehand; D is permuted with the columns, and not corrected for their turning.
* No bias correction of the factors. That of M and D multiplies the step: alpha sqrt(1 - beta2^t)
  / (1 - beta1^t), so that epsilon stands beside the uncorrected sqrt(D).
* Weight decay is applied to the updated W.
* A dimension above ``max_dim`` keeps its coordinates, and vectors do unless ``precondition_1d``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .reference import Hyperparameters, from_basis, matricize, to_basis


def descending_eigvec(L: Tensor) -> Tensor:
    """Eigenvectors as columns, by descending eigenvalue."""
    return torch.linalg.eigh(L).eigenvectors.flip(1)


@dataclass
class SOAP:
    """SOAP; ``h.F`` is the number of steps between QR iterations (authors: 10).

    Args:
        h: hyperparameters; ``h.tau`` and ``h.nadam`` have no place here and must be off.
        max_dim: largest dimension that is preconditioned.
        precondition_1d: whether vectors are.

    Raises:
        ValueError: tau or nadam is set.
    """

    h: Hyperparameters
    max_dim: int = 10_000
    precondition_1d: bool = False
    t: int = 0  # updates made; the first call makes none
    M: Tensor | None = None  # in the basis
    D: Tensor | None = None
    factors: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.h.tau != 0 or self.h.nadam:
            raise ValueError("SOAP has neither a threshold tau nor NAdam's numerator")

    def preconditions(self, G: Tensor, mode: int) -> bool:
        return G.shape[mode] <= self.max_dim and (G.ndim > 1 or self.precondition_1d)

    def accumulate(self, G: Tensor) -> None:
        for i, L in enumerate(self.factors):
            if self.preconditions(G, i):
                X = matricize(G, i)
                self.factors[i] = self.h.beta2 * L + (1 - self.h.beta2) * X @ X.T

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        h = self.h
        if self.M is None or self.D is None:  # the first call
            self.M, self.D = torch.zeros_like(G), torch.zeros_like(G)
            self.factors = [torch.zeros(d, d, dtype=G.dtype) for d in G.shape]
            self.accumulate(G)
            self.bases = [
                descending_eigvec(L) if self.preconditions(G, i) else torch.eye(len(L)).to(L)
                for i, L in enumerate(self.factors)
            ]
            return W
        self.t += 1
        G_tilde = to_basis(G, self.bases)
        self.M = h.beta1 * self.M + (1 - h.beta1) * G_tilde
        self.D = h.beta2 * self.D + (1 - h.beta2) * G_tilde**2
        U = from_basis(self.M / (self.D.sqrt() + h.epsilon), self.bases)
        W = W - h.alpha * math.sqrt(1 - h.beta2**self.t) / (1 - h.beta1**self.t) * U
        W = W - h.alpha * h.weight_decay * W
        self.accumulate(G)
        if self.t % h.F == 0:
            M = from_basis(self.M, self.bases)
            for i, L in enumerate(self.factors):
                if self.preconditions(G, i):
                    self.turn(i, L)
            self.M = to_basis(M, self.bases)
        return W

    def turn(self, i: int, L: Tensor) -> None:
        """One simultaneous iteration of basis i; D's slices are permuted with the columns."""
        assert self.D is not None
        Q = self.bases[i]
        order = torch.diag(Q.T @ L @ Q).argsort(descending=True)
        self.D = self.D.index_select(i, order)
        self.bases[i] = torch.linalg.qr(L @ Q[:, order]).Q
