"""One rule with a switch for every term in which public SOAPs and KL-Shampoos differ. Matrices.

With no switch it is the authors' SOAP (:mod:`algoperf_shampoo.optim.reference_soap`); with
:data:`KL_SOAP` and :data:`KL_SHAMPOO` those (:mod:`algoperf_shampoo.optim.reference_kl`), as
`tests/optim/test_composite.py` shows. A public implementation is described by the switches that
make this rule agree with it, and what each matters by switching it alone back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from algoperf_shampoo.optim.reference import Hyperparameters, from_basis, matricize, to_basis
from algoperf_shampoo.optim.reference_kl import inverse_sqrt, scale_modes
from algoperf_shampoo.optim.reference_soap import descending_eigvec

KL_SOAP = {"factor": "kl", "columns": "unsorted", "correction": "none"}
KL_SHAMPOO = dict(KL_SOAP, update="whiten", moment="parameters")


@dataclass
class Composite:
    """The switches, each with SOAP's authors' setting as its default."""

    h: Hyperparameters
    update: str = "adam"  # or "whiten": KL-Shampoo's
    factor: str = "gram"  # or "kl"

    # The first call.
    first: str = "starts"  # or "updates"
    start: str = "share"  # (1 - beta2) GG'/d; "whole": GG'; "identity": 0.1 I; "zero"

    # Statistics.
    statistics: str = "after"  # the update, or "before"
    debiased: bool = False  # beta2 by the number of calls, as Adam's bias correction has it
    divided: bool = True  # KL: by the other dimension
    eigenvalues: str = "ema"  # "refresh": diag(Q'SQ) then; "each step": of the present S
    initial: float = 0.1  # eigenvalue, before there is one
    floor: str = "authors' clamp"  # "at least epsilon", "plus epsilon"
    exponent: float = 0.5  # of each factor in U, and of the one in the other's right side
    balanced: bool = False  # both factors scaled to one largest entry after each step

    # The basis.
    due: str = "updates"  # counted; or "calls", the first one too
    solver: str = "qr"  # or "eigh"; "eigh once": in the first step
    # "unsorted"; "sorted afterwards" or "ascending afterwards" (D left); "put back" (as they were)
    columns: str = "sorted, D along"
    lift: str = "none"  # added to S's diagonal before QR: "epsilon", "relative" (to the largest)

    # The update.
    moment: str = "basis"  # where M lives, or "parameters"
    correction: str = "step size"  # of Adam's bias; "moments"; KL-SOAP: "none"
    denominator: str = "plus epsilon"  # "at least epsilon"; whiten: also "no epsilon"
    decay: str = "after"  # the update; or "beside", of the W it started from

    calls: int = 0
    t: int = 0  # updates made
    M: Tensor | None = None
    D: Tensor | None = None
    S: list[Tensor] = field(default_factory=list)
    Q: list[Tensor] = field(default_factory=list)
    lam: list[Tensor] = field(default_factory=list)

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        self.calls += 1
        if self.M is None:
            self.begin(G)
            if self.first == "starts":
                return W
        self.t += 1
        h = self.h
        if self.statistics == "before":
            self.accumulate(G)
            self.refresh_if_due()
        new = W - h.alpha * self.direction(G)
        new = new - h.alpha * h.weight_decay * (new if self.decay == "after" else W)
        if self.statistics == "after":
            self.accumulate(G)
            self.refresh_if_due()
        return new

    def begin(self, G: Tensor) -> None:
        self.M, self.D = torch.zeros_like(G), torch.zeros_like(G)
        for i, d in enumerate(G.shape):
            X = matricize(G, i)
            share = (1 - self.h.beta2) / (X.shape[1] if self.factor == "kl" else 1)
            identity = torch.eye(d, dtype=G.dtype)
            gram = X @ X.T
            starts = {"share": share * gram, "whole": gram, "identity": 0.1 * identity}
            self.S.append(starts.get(self.start, torch.zeros_like(gram)))
            self.Q.append(identity if self.start == "zero" else descending_eigvec(self.S[i]))
            self.lam.append(torch.full((d,), self.initial, dtype=G.dtype))

    def root(self, i: int) -> Tensor:
        """lambda_i to the power -exponent."""
        lam = self.lam[i]
        if self.eigenvalues == "each step":
            lam = torch.diag(self.Q[i].T @ self.S[i] @ self.Q[i])
        epsilon = self.h.epsilon
        if self.floor == "authors' clamp":
            return inverse_sqrt(lam, 4000) ** (2 * self.exponent)
        if self.floor == "plus epsilon":
            return (lam + epsilon) ** -self.exponent
        return lam.clamp_min(epsilon) ** -self.exponent

    def accumulate(self, G: Tensor) -> None:
        b = self.h.beta2
        b = 1 - (1 - b) / (1 - b**self.calls) if self.debiased else b
        P = to_basis(G, self.Q)
        roots = [self.root(i) for i in (0, 1)] if self.factor == "kl" else []
        for i in (0, 1):
            X = matricize(G, i)
            if self.factor == "kl":
                # Coordinates in the other mode do, as the Gram matrix of this one sums over them.
                other = 1 - i
                X = matricize(to_basis_but(G, self.Q[other], i) * on_mode(roots[other], other), i)
                X = X / math.sqrt(X.shape[1]) if self.divided else X
                if self.eigenvalues == "ema":
                    mean = (matricize(scale_modes(P, {other: roots[other]}), i) ** 2).mean(1)
                    new = inverse_sqrt(b * self.lam[i] + (1 - b) * mean, 4000)
                    self.lam[i] = new**-2
            self.S[i] = b * self.S[i] + (1 - b) * X @ X.T

    def refresh_if_due(self) -> None:
        count = self.t if self.due == "updates" else self.calls
        if count % self.h.F == 0:
            assert self.M is not None
            M = from_basis(self.M, self.Q) if self.moment == "basis" else self.M
            for i in (0, 1):
                self.refresh(i)
            self.M = to_basis(M, self.Q) if self.moment == "basis" else M
        if self.balanced:
            sizes = [S.abs().max().log() for S in self.S]
            mean = (sizes[0] + sizes[1]) / 2
            self.S = [S * (mean - size).exp() for S, size in zip(self.S, sizes, strict=True)]

    def refresh(self, i: int) -> None:
        assert self.D is not None
        S, Q = self.S[i], self.Q[i]
        quotients = torch.diag(Q.T @ S @ Q)
        if self.lift != "none":
            amount = self.h.epsilon
            if self.lift == "relative":
                amount = max(amount, 64 * len(S) * torch.finfo(S.dtype).eps)
                amount *= quotients.abs().max().item()
            S = S + amount * torch.eye(len(S), dtype=S.dtype)
        order = quotients.argsort(descending=True)
        if self.solver == "eigh" or (self.solver == "eigh once" and self.t == 1):
            Q = descending_eigvec(S)
        elif self.columns == "sorted, D along":
            self.D = self.D.index_select(i, order)
            Q = torch.linalg.qr(S @ Q[:, order]).Q
        elif self.columns == "put back":
            q, r = torch.linalg.qr(S @ Q[:, order])
            Q = torch.empty_like(Q)
            Q[:, order] = q * torch.sign(torch.diag(r))
        else:
            Q = torch.linalg.qr(S @ Q).Q
        quotients = torch.diag(Q.T @ self.S[i] @ Q)
        if self.columns.endswith("afterwards"):
            order = quotients.argsort(descending=self.columns.startswith("sorted"))
            Q, quotients = Q[:, order], quotients[order]
        self.Q[i] = Q
        if self.eigenvalues == "refresh":
            self.lam[i] = quotients

    def direction(self, G: Tensor) -> Tensor:
        assert self.M is not None and self.D is not None
        h = self.h
        G_tilde = to_basis(G, self.Q)
        self.M = h.beta1 * self.M + (1 - h.beta1) * (G_tilde if self.moment == "basis" else G)
        M = self.M if self.moment == "basis" else to_basis(self.M, self.Q)
        if self.update == "whiten":
            root = self.root(0)[:, None] * self.root(1)
            if self.denominator == "plus epsilon":
                root = root / (1 + h.epsilon * root)
            bias = 1 - h.beta1**self.t if self.correction == "moments" else 1.0
            return from_basis(M * root, self.Q) / bias
        self.D = h.beta2 * self.D + (1 - h.beta2) * G_tilde**2
        bias1, bias2 = 1 - h.beta1**self.t, 1 - h.beta2**self.t
        D = self.D / bias2 if self.correction == "moments" else self.D
        denominator = D.sqrt() + h.epsilon
        if self.denominator == "at least epsilon":
            denominator = D.sqrt().clamp_min(h.epsilon)
        factor = {"step size": math.sqrt(bias2) / bias1, "moments": 1 / bias1, "none": 1.0}
        return from_basis(M / denominator, self.Q) * factor[self.correction]


def to_basis_but(G: Tensor, Q_other: Tensor, mode: int) -> Tensor:
    """G rotated in the mode that is not ``mode``."""
    return G @ Q_other if mode == 0 else Q_other.T @ G


def on_mode(scale: Tensor, mode: int) -> Tensor:
    """A vector that scales the slices of a mode of a matrix."""
    return scale[:, None] if mode == 0 else scale[None, :]
