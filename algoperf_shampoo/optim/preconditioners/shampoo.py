"""Shampoo with Adam grafting, as the winning AlgoPerf submission runs it (Algorithm 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buckets import Stack
from ..linalg import inverse_root, rotate
from ..precision import matmul_precision
from .base import Hyper, Rule, adam_direction


class GraftedShampoo(Rule):
    """U = S ||A|| / (||S|| + 1e-16), S = L^-1/4 M^ R^-1/4, A = Adam's direction; norms per block.

    Exponent 1/(2k) * exponent_multiplier per factor of a block of order k. Pure Adam before the
    first roots.

    Args:
        eps: epsilon added to the factors' eigenvalues.
        grafting_eps: Adam's epsilon in A.

    Raises:
        ValueError: a negative epsilon or multiplier.
    """

    def __init__(self, eps: float, grafting_eps: float, exponent_multiplier: float = 1.0) -> None:
        for name, value in (("eps", eps), ("grafting_eps", grafting_eps)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value!r}")
        if not exponent_multiplier >= 0:
            raise ValueError(f"exponent_multiplier must be >= 0, got {exponent_multiplier!r}")
        self.eps = eps
        self.grafting_eps = grafting_eps
        self.exponent_multiplier = exponent_multiplier

    def init(self, stack: Stack) -> None:
        stack.state["exp_avg"] = stack.zeros(*stack.shape)  # M
        stack.state["exp_avg_sq"] = stack.zeros(*stack.shape)  # D, of the grafting

    def update(self, stack: Stack, g: Tensor, h: Hyper) -> Tensor:
        m, v = stack.state["exp_avg"], stack.state["exp_avg_sq"]
        a = adam_direction(m, v, g, stack, h, eps=self.grafting_eps)
        if not any(stack.ready):
            return a
        numerator = torch.lerp(g, m, h.beta1) if h.nadam else m
        with matmul_precision(h.matmul_precision):
            # Roots are symmetric, so `rotate` (by the transpose) applies them as they are. The
            # bias correction of M scales S alone, which the norm takes out again.
            s = rotate(numerator, stack.operators)
        dims = tuple(range(1, s.ndim))
        norm = torch.linalg.vector_norm
        ratio = norm(a, dim=dims, keepdim=True) / (norm(s, dim=dims, keepdim=True) + 1e-16)
        s.mul_(ratio)
        if not all(stack.ready):  # rows whose first root is still to come stay with Adam
            ready = torch.tensor(stack.ready, device=s.device).reshape([-1] + [1] * len(dims))
            s = torch.where(ready, s, a)
        return s

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        exponent = self.exponent_multiplier / (2 * order)
        with matmul_precision("highest"):
            values = eigenvalues / correction[:, None]
            return inverse_root(values, eigenvectors, exponent, self.eps)
