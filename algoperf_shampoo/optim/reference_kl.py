"""KL-Shampoo and KL-SOAP as their authors run them: one tensor, float64, loops.

In the style of :mod:`.reference`. Sources: the poster "Understanding and improving Shampoo via
Kullback-Leibler minimization" (Lin et al., 2025), which has the estimation scheme, and the
authors' code (yorkerlin/KL-Methods at a02e6221), which has everything else. For G [d1, d2] the
poster's stationarity conditions are

    S1 = E[G S2^-1 G'] / d2,   S2 = E[G' S1^-1 G] / d1,

and here each factor is an EMA of its right side, S_i^-1 being Q_i diag(1/lambda_i) Q_i'. For
order k, mode i is whitened in all modes but its own and divided by the product of the other
dimensions.

* The first call starts S from the gradient alone (E[GG'] / d2), takes eigenvectors by eigh,
  descending, sets all lambda to ``initial_eigenvalue`` and updates nothing; it does not count.
* Statistics follow the update. No bias corrections. Weight decay is applied to the updated W.
* Every F steps Q_i = QR(S_i Q_i), one simultaneous iteration. Columns are not sorted.
* lambda by its own EMA (``eigenvalues="ema"``, the authors' way and memory d1 + d2): of the mean
  over the other modes of P^2 / lambda_other, P the rotated gradient. Before it enters anything,
  lambda^-1/2 is clamped to at most max(10, min(d, ``max_clamp``)).
* The other reading in public code (``"decomposition"``): lambda = diag(Q'SQ) at a refresh, as it
  is between refreshes otherwise. The clamp stays.
* KL-SOAP has the same S, Q and lambda, but Adam's M and D in the basis for its update,
  uncorrected. M is taken along when Q changes, D is not.

The poster prints S = S1 (x) S2 for g flattened row by row; the paper's R (x) L is for columns. In
the poster's lower right corner the moments of a matrix Gaussian read S1 over Tr(S2) and S2 over
Tr(S1) in our copy of its text; they are products, E[GG'] = Tr(S2) S1 and E[G'G] = Tr(S1) S2.

For order 3 the authors' code renews the eigenvalues one mode after the other, last mode first,
and lets the later ones see the new values of the earlier (for matrices it does not).
``sequential=True`` does that; otherwise all modes see the old ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .reference import Hyperparameters, from_basis, matricize, mode_product, to_basis
from .reference_soap import descending_eigvec

EIGENVALUES = ("ema", "decomposition")


def inverse_sqrt(lam: Tensor, max_clamp: int | None) -> Tensor:
    """lambda^-1/2 clamped to max(10, min(d, max_clamp)); 0 where lambda is 0."""
    root = torch.where(lam > 0, lam.clamp_min(1e-300) ** -0.5, 0.0)
    return root if max_clamp is None else root.clamp(max=max(10, min(len(lam), max_clamp)))


def scale_modes(X: Tensor, scales: dict[int, Tensor]) -> Tensor:
    """X with every slice j of mode i multiplied by scales[i][j]."""
    for mode, s in scales.items():
        shape = [-1 if i == mode else 1 for i in range(X.ndim)]
        X = X * s.reshape(shape)
    return X


@dataclass
class KLShampoo:
    """KL-Shampoo: U is M in the basis Q, divided by sqrt(prod lambda) + epsilon, taken back.

    Args:
        h: hyperparameters (authors: betas .9 and .98, F = 10, weight decay .01).
        eigenvalues: "ema" or "decomposition", see the module.
        initial_eigenvalue: of all lambda.
        max_clamp: upper end of the clamp of lambda^-1/2; None: no clamp.
        sequential: the authors' order of updates for tensors of order 3.
        exact: eigh instead of one QR iteration at a refresh, descending.

    Raises:
        ValueError: an unknown ``eigenvalues``; tau or nadam set; ``sequential`` with order other
            than 2 or 3.
    """

    h: Hyperparameters
    eigenvalues: str = "ema"
    initial_eigenvalue: float = 0.1
    max_clamp: int | None = 4000
    sequential: bool = False
    exact: bool = False
    t: int = 0  # updates made; the first call makes none
    M: Tensor | None = None
    factors: list[Tensor] = field(default_factory=list)  # S_i
    bases: list[Tensor] = field(default_factory=list)  # Q_i
    lam: list[Tensor] = field(default_factory=list)  # lambda_i, after the clamp

    def __post_init__(self) -> None:
        if self.eigenvalues not in EIGENVALUES:
            known = ", ".join(EIGENVALUES)
            raise ValueError(f"eigenvalues must be one of {known}, got {self.eigenvalues!r}")
        if self.h.tau != 0 or self.h.nadam:
            raise ValueError("KL-Shampoo has neither a threshold tau nor NAdam's numerator")

    def start(self, G: Tensor) -> None:
        """The first call."""
        b = self.h.beta2
        if self.sequential and G.ndim not in (2, 3):
            raise ValueError(f"sequential is for tensors of order 2 and 3, got {G.ndim}")
        self.M = torch.zeros_like(G)
        for i in range(G.ndim):
            X = matricize(G, i)
            self.factors.append((1 - b) / X.shape[1] * X @ X.T)
        self.bases = [descending_eigvec(S) for S in self.factors]
        initial = self.initial_eigenvalue
        self.lam = [torch.full((d,), initial, dtype=G.dtype) for d in G.shape]

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        if self.M is None:
            self.start(G)
            return W
        self.t += 1
        W = W - self.h.alpha * self.direction(G)
        W = W - self.h.alpha * self.h.weight_decay * W
        self.accumulate(G)
        if self.t % self.h.F == 0:
            self.refresh()
        return W

    def inverse_sqrt(self, i: int) -> Tensor:
        return inverse_sqrt(self.lam[i], self.max_clamp)

    def direction(self, G: Tensor) -> Tensor:
        assert self.M is not None
        self.M = self.h.beta1 * self.M + (1 - self.h.beta1) * G
        scales = {i: self.inverse_sqrt(i) for i in range(G.ndim)}
        root = scale_modes(torch.ones_like(G), scales)  # lambda^-1/2 of the product
        root = root / (1 + self.h.epsilon * root)  # 1 / (lambda^1/2 + epsilon)
        return from_basis(to_basis(self.M, self.bases) * root, self.bases)

    def accumulate(self, G: Tensor) -> None:
        """EMAs of S_i and, with "ema", of lambda_i; every right side with the old Q."""
        b, k = self.h.beta2, G.ndim
        P = to_basis(G, self.bases)
        old = [self.inverse_sqrt(i) for i in range(k)]
        one_by_one = self.sequential and k == 3
        for i in reversed(range(k)):
            others = {j: old[j] for j in range(k) if j != i}  # lambda_j^-1/2 as mode i sees them
            if one_by_one and i == 0:
                others[1] = self.inverse_sqrt(1)  # S_1 sees the new lambda_2, the old lambda_3
            # Coordinates in the other modes do: in a Gram matrix of mode i their rotations cancel.
            X = matricize(mode_product(scale_modes(P, others), self.bases[i], i), i)
            self.factors[i] = b * self.factors[i] + (1 - b) / X.shape[1] * X @ X.T
            if self.eigenvalues == "ema":
                if one_by_one and i == 1:
                    others[2] = self.inverse_sqrt(2)  # lambda_2 sees the new lambda_3
                mean = (matricize(scale_modes(P, others), i) ** 2).mean(1)
                new = b * self.lam[i] + (1 - b) * mean
                root = inverse_sqrt(new, self.max_clamp)
                self.lam[i] = torch.where(root > 0, root.clamp_min(1e-300) ** -2, 0.0)

    def refresh(self) -> None:
        for i, S in enumerate(self.factors):
            Q = self.bases[i]
            self.bases[i] = descending_eigvec(S) if self.exact else torch.linalg.qr(S @ Q).Q
            if self.eigenvalues == "decomposition":
                self.lam[i] = torch.diag(self.bases[i].T @ S @ self.bases[i])


@dataclass
class KLSOAP(KLShampoo):
    """KL-SOAP: Adam, uncorrected, in KL-Shampoo's basis. M is kept in the basis."""

    D: Tensor | None = None

    def direction(self, G: Tensor) -> Tensor:
        h = self.h
        assert self.M is not None
        D = torch.zeros_like(G) if self.D is None else self.D
        G_tilde = to_basis(G, self.bases)
        self.M = h.beta1 * self.M + (1 - h.beta1) * G_tilde
        self.D = h.beta2 * D + (1 - h.beta2) * G_tilde**2
        return from_basis(self.M / (self.D.sqrt() + h.epsilon), self.bases)

    def refresh(self) -> None:
        assert self.M is not None
        M = from_basis(self.M, self.bases)
        super().refresh()
        self.M = to_basis(M, self.bases)
