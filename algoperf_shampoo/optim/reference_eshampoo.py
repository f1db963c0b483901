"""EShampoo with the paper's ablations, and with Algorithm 4: one tensor, float64, loops.

In the style of :mod:`.reference`, which has Algorithm 2 itself and the list of misprints. Source:
Eschenhagen et al., "Purifying Shampoo" (NeurIPS 2025).

* :func:`warm_started_qr` is Algorithm 4, with its loop condition mended: iterate while Eq. 11
  does **not** hold. It is simultaneous iteration: QR(Q'LQ) and Q <- Q (that Q) is QR(LQ).
* The order of columns is part of EShampoo, because D is accumulated by index, and the paper does
  not give one for Algorithm 4. Simultaneous iteration moves columns towards descending
  eigenvalues, so here a refresh first sorts them so, by diag(Q'LQ), and D moves along with its
  columns (SOAP's code does the same with its second moment). ``qr_order="ascending"`` is the
  authors' way instead: sorted at the end, at every check, skipped ones too; with
  ``permute_D=False`` D stays behind, as it does there.
* beta3 (Fig. 6) is the EMA coefficient of D; beta2 that of the factors.
* The basis-aware correction (Eq. 27): when the basis changes, D <- (R_1 o R_1, ..., R_k o R_k) D,
  with R_i = Q_new' Q_old per factor, before the new gradient enters.
* tau as a schedule over steps (Fig. 5, left): ``tau_at``; a basis frozen after a step:
  ``freeze_after``. With tau = 0.99 for all of training, as the paper has it, the basis is not
  frozen on small models: below d of about 150 a factor of rank one passes Eq. 11 with Q = I.
* Grafting (Eq. 7), which EShampoo makes needless: ``grafting_epsilon``.
* Vectors (Fig. 5, right): ``one_dim`` = "full" (the paper's runs), "adam", or "only"
  (vectors preconditioned, everything else by Adam).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .reference import (
    AdamW,
    Hyperparameters,
    eigvec,
    from_basis,
    matricize,
    mode_product,
    numerator,
    relative_off_diagonal,
    to_basis,
)

ONE_DIM = ("full", "adam", "only")
QR_ORDERS = ("descending", "ascending")


def warm_started_qr(
    L: Tensor, Q: Tensor, tau: float, max_iterations: int
) -> tuple[Tensor, Tensor, int]:
    """Algorithm 4, mended: Q^ such that Eq. 11 holds for L, after at most I = max_iterations.

    Returns:
        Q^ and Lambda^ = Q^'LQ^ (both [d, d]) and the number of iterations taken.
    """
    i = 0  # line 1
    Lambda = Q.T @ L @ Q  # line 2
    identity = torch.eye(len(L), dtype=L.dtype)
    while relative_off_diagonal(Lambda, identity) > tau and i < max_iterations:  # line 3, mended
        Q_step, R_step = torch.linalg.qr(Lambda)  # line 4
        Lambda = R_step @ Q_step  # line 5
        Q = Q @ Q_step  # line 6
        i += 1  # line 7
    return Q, Lambda, i  # line 9


def two_stage_tau(first: float, then: float, switch: int) -> Callable[[int], float]:
    """tau(t): ``first`` for t <= ``switch``, ``then`` afterwards."""
    return lambda t: first if t <= switch else then


def preconditioned(order: int, one_dim: str) -> bool:
    """Whether a tensor of this order leaves the identity basis.

    Raises:
        ValueError: ``one_dim`` is none of :data:`ONE_DIM`.
    """
    if one_dim not in ONE_DIM:
        raise ValueError(f"one_dim must be one of {', '.join(ONE_DIM)}, got {one_dim!r}")
    return {"full": True, "adam": order > 1, "only": order == 1}[one_dim]


@dataclass
class EShampooAblation:
    """Algorithm 2 with options; with none set it is :class:`.reference.EShampoo`.

    Args:
        h: hyperparameters.
        beta3: EMA coefficient of D; ``h.beta2`` when None.
        basis_aware: Eq. 27 at every change of a basis.
        tau_at: tau as a function of the step, instead of ``h.tau``.
        freeze_after: no refresh after this step.
        one_dim: which tensors leave the identity basis.
        max_iterations: I of Algorithm 4; None: torch.linalg.eigh.
        qr_order: order of columns with Algorithm 4, see the module.
        permute_D: whether D moves along with permuted columns.
        ridge: added to a factor's diagonal before Eq. 11 and the solver. The authors' code adds
            epsilon, which freezes the basis once all eigenvalues are below it; we add nothing.
        grafting_epsilon: graft the norm of Adam with this epsilon; None: no grafting.
    """

    h: Hyperparameters
    beta3: float | None = None
    basis_aware: bool = False
    tau_at: Callable[[int], float] | None = None
    freeze_after: int | None = None
    one_dim: str = "full"
    max_iterations: int | None = None
    qr_order: str = "descending"
    permute_D: bool = True
    ridge: float = 0.0
    grafting_epsilon: float | None = None
    adam: AdamW | None = None
    t: int = 0
    M: Tensor | None = None
    D: Tensor | None = None
    factors: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    refreshed: list[bool] = field(default_factory=list)  # of the last step, per factor
    iterations: list[int] = field(default_factory=list)  # of Algorithm 4 in the last step

    def __post_init__(self) -> None:
        if self.qr_order not in QR_ORDERS:
            known = ", ".join(QR_ORDERS)
            raise ValueError(f"qr_order must be one of {known}, got {self.qr_order!r}")
        if self.basis_aware and self.max_iterations is not None and not self.permute_D:
            raise ValueError("basis_aware moves D with the basis: permute_D must be True")

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        h, k = self.h, G.ndim
        if self.M is None:
            self.M = torch.zeros_like(G)
            self.factors = [torch.zeros(d, d, dtype=G.dtype) for d in G.shape]
            self.bases = [torch.eye(d, dtype=G.dtype) for d in G.shape]
        D = torch.zeros_like(G) if self.D is None else self.D
        self.t += 1
        self.M = h.beta1 * self.M + (1 - h.beta1) * G  # line 4
        for i, L in enumerate(self.factors):  # line 5
            X = matricize(G, i)
            self.factors[i] = h.beta2 * L + (1 - h.beta2) * X @ X.T
        self.refreshed, self.iterations = [False] * k, [0] * k
        thawed = self.freeze_after is None or self.t <= self.freeze_after
        if preconditioned(k, self.one_dim) and thawed and self.t % h.F == 0:
            for i in range(k):  # lines 6 and 7
                D = self.refresh(i, D)
        beta3 = h.beta2 if self.beta3 is None else self.beta3
        G_tilde = to_basis(G, self.bases)  # line 10
        self.D = beta3 * D + (1 - beta3) * G_tilde**2  # line 11
        M_hat = numerator(self.M, G, h, self.t)  # line 12
        D_hat = self.D / (1 - beta3**self.t)
        U = from_basis(to_basis(M_hat, self.bases) / (D_hat.sqrt() + h.epsilon), self.bases)
        if self.grafting_epsilon is not None:
            if self.adam is None:
                self.adam = AdamW(replace(h, epsilon=self.grafting_epsilon))
            U = U * (self.adam.direction(G).norm() / (U.norm() + 1e-16))
        return W - h.alpha * (U + h.weight_decay * W)  # line 13

    def refresh(self, i: int, D: Tensor) -> Tensor:
        """The basis of factor i where Eq. 11 fails; returns D in the coordinates to go on with."""
        tau = self.h.tau if self.tau_at is None else self.tau_at(self.t)
        L, Q_old = self.factors[i] / (1 - self.h.beta2**self.t), self.bases[i]
        if self.ridge:
            L = L + self.ridge * torch.eye(len(L), dtype=L.dtype)
        good_enough = not L.any() or (tau > 0 and relative_off_diagonal(L, Q_old) <= tau)
        self.refreshed[i] = not good_enough
        order = None
        if self.max_iterations is None:
            if good_enough:
                return D
            self.bases[i] = eigvec(L)
        elif self.qr_order == "descending":
            if good_enough:
                return D
            order = torch.diag(Q_old.T @ L @ Q_old).argsort(descending=True, stable=True)
            Q, _, self.iterations[i] = warm_started_qr(L, Q_old[:, order], tau, self.max_iterations)
            self.bases[i] = Q
        else:
            Q, Lambda, self.iterations[i] = warm_started_qr(L, Q_old, tau, self.max_iterations)
            order = torch.diag(Lambda).argsort(stable=True)
            self.bases[i] = Q[:, order]
        if self.basis_aware:  # Eq. 27; a permutation of columns is part of R
            R = self.bases[i].T @ Q_old
            return mode_product(D, R**2, i)
        return D.index_select(i, order) if order is not None and self.permute_D else D
