"""Shampoos of pytorch_optimizer, as rules with a switch for every term that differs from ours.

With no switch they are :class:`~algoperf_shampoo.optim.reference_shampoo.Shampoo` and
:class:`~algoperf_shampoo.optim.reference.ShampooGrafting` (`tests/optim/test_composite.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from algoperf_shampoo.optim.reference import Hyperparameters, from_basis, inverse_root, matricize


@dataclass
class UngraftedShampoo:
    """Shampoo without grafting."""

    h: Hyperparameters
    momentum: str = "of gradients"  # "none", "of gradient and last update"
    statistics: str = "average"  # corrected; or "sum"
    start: str = "zero"  # of the factors, epsilon added to the root's; or "epsilon"
    before_roots: str = "M"  # the update then, or "none"
    t: int = 0
    M: Tensor | None = None
    factors: list[Tensor] = field(default_factory=list)
    roots: list[Tensor] = field(default_factory=list)

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        h = self.h
        self.t += 1
        if self.M is None:
            self.M = G if self.momentum == "of gradient and last update" else torch.zeros_like(G)
            size = h.epsilon if self.start == "epsilon" else 0.0
            self.factors = [size * torch.eye(d, dtype=G.dtype) for d in G.shape]
        if self.momentum == "of gradients":
            self.M = h.beta1 * self.M + (1 - h.beta1) * G
            N = self.M / (1 - h.beta1**self.t)
        elif self.momentum == "of gradient and last update":
            N = G = h.beta1 * self.M + (1 - h.beta1) * G
        else:
            N = G
        keep, add = (1.0, 1.0) if self.statistics == "sum" else (h.beta2, 1 - h.beta2)
        for i, L in enumerate(self.factors):
            X = matricize(G, i)
            self.factors[i] = keep * L + add * X @ X.T
        if self.t % h.F == 0:
            bias = 1.0 if self.statistics == "sum" else 1 - h.beta2**self.t
            epsilon = 0.0 if self.start == "epsilon" else h.epsilon
            exponent = 1 / (2 * G.ndim)
            self.roots = [inverse_root(L / bias, exponent, epsilon) for L in self.factors]
        if self.roots:
            U = from_basis(N, self.roots)
        else:
            U = N if self.before_roots == "M" else torch.zeros_like(N)
        if self.momentum == "of gradient and last update":
            self.M = U
        return W - h.alpha * (U + h.weight_decay * W)


@dataclass
class GraftedShampoo:
    """Shampoo with the norm of Adam, or of RMSProp where nothing is bias-corrected."""

    h: Hyperparameters
    momentum: str = "before grafting"  # or "after" it
    correction: bool = True
    start: str = "zero"  # as in UngraftedShampoo
    t: int = 0
    M: Tensor | None = None  # of the gradient, or of the grafted update
    M_graft: Tensor | None = None  # momentum after grafting: of the graft's own update
    D: Tensor | None = None
    factors: list[Tensor] = field(default_factory=list)
    roots: list[Tensor] = field(default_factory=list)

    def step(self, W: Tensor, G: Tensor) -> Tensor:
        h = self.h
        self.t += 1
        if self.M is None or self.D is None or self.M_graft is None:
            self.M = self.M_graft = self.D = torch.zeros_like(G)
            size = h.epsilon if self.start == "epsilon" else 0.0
            self.factors = [size * torch.eye(d, dtype=G.dtype) for d in G.shape]
            self.roots = [torch.eye(d, dtype=G.dtype) for d in G.shape]
        self.D = h.beta2 * self.D + (1 - h.beta2) * G**2
        for i, L in enumerate(self.factors):
            X = matricize(G, i)
            self.factors[i] = h.beta2 * L + (1 - h.beta2) * X @ X.T
        bias1, bias2 = 1 - h.beta1**self.t, 1 - h.beta2**self.t
        if not self.correction:
            bias1 = bias2 = 1.0
        if self.t % h.F == 0:
            epsilon = 0.0 if self.start == "epsilon" else h.epsilon
            exponent = 1 / (2 * G.ndim)
            self.roots = [inverse_root(L / bias2, exponent, epsilon) for L in self.factors]
        N = G
        if self.momentum == "before grafting":
            self.M = h.beta1 * self.M + (1 - h.beta1) * G
            N = self.M / bias1
        A = N / ((self.D / bias2).sqrt() + h.epsilon)
        S = from_basis(N, self.roots)
        S = S * (A.norm() / (S.norm() + 1e-16))
        if self.momentum == "after":
            self.M = h.beta1 * self.M + (1 - h.beta1) * S
            self.M_graft = h.beta1 * self.M_graft + (1 - h.beta1) * A
            S, A = self.M / bias1, self.M_graft / bias1
        U = S if self.t >= h.F else A
        return W - h.alpha * (U + h.weight_decay * W)
