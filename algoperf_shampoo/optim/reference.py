"""The algorithms as the paper prints them: one tensor, float64, loops, the paper's symbols.

Slow on purpose. The tests hold the fast optimizer (:mod:`.optimizer`) against these functions, so
nothing here shares code with it.

Source: Eschenhagen, Defazio, Lee, Turner, Shi, "Purifying Shampoo" (NeurIPS 2025), Algorithms 2
and 3 and Eq. 11. The other variants of the family are in :mod:`.reference_shampoo` (without
grafting, adaptive, Shampoo^2), :mod:`.reference_eshampoo` (Algorithm 4, ablations),
:mod:`.reference_soap` and :mod:`.reference_kl`.

Misprints and gaps of the paper that are mended, here or in those:

* Algorithm 2, line 6 reads "t mod F = 0 and Equation (11)". Eq. 11 says when the old basis is good
  *enough*, so a new one is computed when t mod F = 0 and Eq. 11 does **not** hold.
* Algorithm 3 leaves out momentum, bias corrections and weight decay ("simplified"); here they are
  as the winning AlgoPerf submission runs them.
* Algorithm 2 with tau = 0 is the fixed-frequency variant: every F steps, whatever Eq. 11 says. An
  all-zero factor has no basis to prefer and keeps the one it has.
* Line 8 of Algorithm 1 rotates back with Q_R instead of its transpose.
* Algorithm 4, line 3 reads "while ... <= tau": the loop runs while the criterion is **not** met.
* The text between Eqs. 5 and 6 has R for R_t in U, line 7 of Algorithm 3 G for G_t.
* Appendix C writes Shampoo's preconditioner as (E[GG'] (x) E[G'G])^1/2; with vec by columns, as
  everywhere else, it is (E[G'G] (x) E[GG'])^1/2.
* The proof of Corollary 1 calls (Q_R (x) Q_L)' the eigenvectors of Shampoo; they are the columns of
  Q_R (x) Q_L.
* Eq. 25 begins with Q' g_t for Q_T' g_t; Eq. 26 has (1 - beta2) Q_T' g_t g_t' Q_T once, for
  g_T g_T'. After Eq. 24, "D* ~ D_T" for D^_T.
* The trace scale S^-1 is defined for matrices; Algorithm 4 gives no order of columns and does not
  say what becomes of D: :mod:`.reference_shampoo`, :mod:`.reference_eshampoo`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def matricize(G: Tensor, mode: int) -> Tensor:
    """Mode-``mode`` matricization: [d_1, ..., d_k] -> [d_mode, product of the others]."""
    return G.movedim(mode, 0).reshape(G.shape[mode], -1)


def mode_product(G: Tensor, A: Tensor, mode: int) -> Tensor:
    """Multiply every mode-``mode`` fibre of G by A: for matrices A @ G (mode 0), G @ A.T (mode
    1)."""
    return torch.tensordot(A, G, dims=([1], [mode])).movedim(0, mode)


def to_basis(G: Tensor, Q: Sequence[Tensor]) -> Tensor:
    """Q_L' G Q_R, for a tensor of any order: coordinates of G in the eigenbases Q."""
    for mode, q in enumerate(Q):
        G = mode_product(G, q.T, mode)
    return G


def from_basis(G: Tensor, Q: Sequence[Tensor]) -> Tensor:
    """Q_L G Q_R': the inverse of :func:`to_basis` for orthogonal Q."""
    for mode, q in enumerate(Q):
        G = mode_product(G, q, mode)
    return G


def relative_off_diagonal(L: Tensor, Q: Tensor) -> float:
    """Left side of Eq. 11: ||Q'LQ - diag(Q'LQ)||_F / ||Q'LQ||_F; 0 for an all-zero factor."""
    Lambda = Q.T @ L @ Q
    off = total = 0.0
    for i in range(Lambda.shape[0]):
        for j in range(Lambda.shape[1]):
            total += Lambda[i, j].item() ** 2
            if i != j:
                off += Lambda[i, j].item() ** 2
    return math.sqrt(off / total) if total > 0 else 0.0


def eigvec(L: Tensor) -> Tensor:
    """Eigenvectors as columns, by ascending eigenvalue (their order is part of the algorithm: D is
    accumulated by index)."""
    return torch.linalg.eigh(L).eigenvectors


def inverse_root(L: Tensor, exponent: float, epsilon: float) -> Tensor:
    """L^-exponent from eigh, with lambda shifted by -min(lambda_min, 0) + epsilon.

    With epsilon = 0 a pseudo-inverse's root: 0 where lambda is rounding; I for a matrix of zeros.
    """
    lam, Q = torch.linalg.eigh(L)
    lam = lam - min(lam.min().item(), 0.0) + epsilon
    if epsilon == 0 and lam.max() == 0:
        return torch.eye(len(lam), dtype=L.dtype)
    root = lam**-exponent
    if epsilon == 0:
        root[lam <= len(lam) * torch.finfo(L.dtype).eps * lam.max()] = 0
    return Q @ torch.diag(root) @ Q.T


@dataclass
class Hyperparameters:
    """The paper's symbols, with the names used elsewhere in this project."""

    alpha: float = 1e-3  # lr
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0  # lambda in Algorithm 2
    nadam: bool = False
    F: int = 1  # precondition_frequency: steps between checks
    tau: float = 0.0  # threshold of Eq. 11; 0: a new basis every F steps
    kappa: float = 0.0  # EShampoo: coordinates at rounding, kappa sqrt(E||G||^2), take no step


def numerator(M: Tensor, G: Tensor, h: Hyperparameters, t: int) -> Tensor:
    """M~ (Algorithm 2, line 12), or with NAdam (beta1 M + (1 - beta1) G) / (1 - beta1^t)."""
    if h.nadam:
        M = h.beta1 * M + (1 - h.beta1) * G
    return M / (1 - h.beta1**t)


@dataclass
class AdamW:
    """AdamW (Loshchilov & Hutter); with ``nadam`` the NAdamW of AlgoPerf's baselines.

    That NAdamW divides the whole numerator by 1 - beta1^t; torch.optim.NAdam divides the momentum
    part by 1 - beta1^(t+1) and lets beta1 grow over the first steps, so the two differ early on.
    """

    h: Hyperparameters
    t: int = 0
    M: Tensor | None = None
    D: Tensor | None = None

    def direction(self, G: Tensor) -> Tensor:
        h = self.h
        if self.M is None or self.D is None:
            self.M, self.D = torch.zeros_like(G), torch.zeros_like(G)
        self.t += 1
        self.M = h.beta1 * self.M + (1 - h.beta1) * G
        self.D = h.beta2 * self.D + (1 - h.beta2) * G**2
        D_hat = self.D / (1 - h.beta2**self.t)
        return numerator(self.M, G, h, self.t) / (D_hat.sqrt() + h.epsilon)

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        U = self.direction(G)
        return W - self.h.alpha * (U + self.h.weight_decay * W)


@dataclass
class EShampoo:
    """Algorithm 2 for a tensor of any order k >= 1 (k = 1 is full-matrix Adam in its eigenbasis).

    ``bases`` may be set from outside before a step: with equal Q two implementations must agree
    even where the eigenvectors themselves are arbitrary (null spaces, equal eigenvalues).
    """

    h: Hyperparameters
    t: int = 0
    M: Tensor | None = None
    D: Tensor | None = None
    factors: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    refreshed: list[bool] = field(default_factory=list)  # of the last step, per factor

    def step(self, W: Tensor, G: Tensor, bases: Sequence[Tensor] | None = None) -> Tensor:
        """One step; ``bases`` replaces the outcome of lines 6 to 9 when given."""
        h = self.h
        if self.M is None or self.D is None:
            self.M, self.D = torch.zeros_like(G), torch.zeros_like(G)
            self.factors = [torch.zeros(d, d, dtype=G.dtype) for d in G.shape]
            self.bases = [torch.eye(d, dtype=G.dtype) for d in G.shape]
        self.t += 1
        self.M = h.beta1 * self.M + (1 - h.beta1) * G  # line 4
        for i, L in enumerate(self.factors):  # line 5
            X = matricize(G, i)
            self.factors[i] = h.beta2 * L + (1 - h.beta2) * X @ X.T
        self.refreshed = [False] * len(self.factors)
        if bases is not None:
            self.bases = list(bases)
        elif self.t % h.F == 0:  # line 6, mended
            for i, L in enumerate(self.factors):
                good_enough = h.tau > 0 and relative_off_diagonal(L, self.bases[i]) <= h.tau
                if L.any() and not good_enough:
                    self.bases[i] = eigvec(L / (1 - h.beta2**self.t))  # line 7
                    self.refreshed[i] = True
        G_tilde = to_basis(G, self.bases)  # line 10
        self.D = h.beta2 * self.D + (1 - h.beta2) * G_tilde**2  # line 11
        M_hat = numerator(self.M, G, h, self.t)  # line 12
        D_hat = self.D / (1 - h.beta2**self.t)
        U_tilde = to_basis(M_hat, self.bases) / (D_hat.sqrt() + h.epsilon)
        level = h.kappa * (torch.trace(self.factors[0]) / (1 - h.beta2**self.t)).sqrt()
        moment = to_basis(self.M, self.bases).abs() / (1 - h.beta1**self.t)
        if any(not torch.equal(Q, torch.eye(len(Q), dtype=Q.dtype)) for Q in self.bases):
            U_tilde[(D_hat.sqrt() < level) & (moment < level)] = 0
        U = from_basis(U_tilde, self.bases)
        return W - h.alpha * (U + h.weight_decay * W)  # line 13


@dataclass
class ShampooGrafting:
    """Algorithm 3 as the winning submission runs it: Shampoo's direction, Adam's magnitude.

    Pure Adam before the first root (step F); the exponent is 1/(2k) per factor for a tensor of
    order k; root and grafting use bias-corrected statistics; the norms are taken per tensor
    (block).
    """

    h: Hyperparameters
    grafting_epsilon: float = 1e-8
    t: int = 0
    adam: AdamW | None = None
    factors: list[Tensor] = field(default_factory=list)
    roots: list[Tensor] = field(default_factory=list)

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        h = self.h
        if self.adam is None:
            graft = Hyperparameters(**{**h.__dict__, "epsilon": self.grafting_epsilon})
            self.adam = AdamW(graft)
            self.factors = [torch.zeros(d, d, dtype=G.dtype) for d in G.shape]
        self.t += 1
        for i, L in enumerate(self.factors):
            X = matricize(G, i)
            self.factors[i] = h.beta2 * L + (1 - h.beta2) * X @ X.T
        if self.t % h.F == 0:
            correction = 1 - h.beta2**self.t
            exponent = 1 / (2 * G.ndim)
            self.roots = [inverse_root(L / correction, exponent, h.epsilon) for L in self.factors]
        U = A = self.adam.direction(G)
        if self.roots:
            assert self.adam.M is not None
            S = from_basis(numerator(self.adam.M, G, h, self.t), self.roots)
            U = S * (A.norm() / (S.norm() + 1e-16))
        return W - h.alpha * (U + h.weight_decay * W)
