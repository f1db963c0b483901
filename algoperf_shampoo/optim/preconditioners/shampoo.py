"""Shampoo with Adam grafting, as the winning AlgoPerf submission runs it (Algorithm 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..buckets import Stack
from ..fused import adam_
from ..linalg import inverse_root, rotate
from ..precision import matmul_precision
from .base import Hyper, Rule


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
        for name, value in (
            ("eps", eps),
            ("grafting_eps", grafting_eps),
            ("exponent_multiplier", exponent_multiplier),
        ):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value!r}")
        self.eps = eps
        self.grafting_eps = grafting_eps
        self.exponent_multiplier = exponent_multiplier

    def update(self, stack: Stack, g: Tensor, h: Hyper) -> None:
        m, v = stack.state["exp_avg"], stack.state["exp_avg_sq"]
        ready = any(stack.ready)
        gradient = g.clone() if ready and h.nadam else g
        adam_(g, m, v, h.c1, h.c2, h.beta1, h.beta2, self.grafting_eps, h.nadam)  # g is now A
        if not ready:
            return
        # The bias correction of M scales S alone, and the norm takes it out again.
        numerator = gradient.lerp_(m, h.beta1) if h.nadam else m
        # Roots are symmetric: `rotate`, by the transpose, applies them as they are.
        s = rotate(numerator, stack.operators)
        dims = tuple(range(1, s.ndim))
        norm = torch.linalg.vector_norm
        s.mul_(norm(g, dim=dims, keepdim=True) / (norm(s, dim=dims, keepdim=True) + 1e-16))
        if all(stack.ready):
            g.copy_(s)
        else:  # rows whose first root is still to come stay with Adam
            index = stack.ready_rows()
            g.index_copy_(0, index, s[index])

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        exponent = self.exponent_multiplier / (2 * order)
        with matmul_precision("highest"):
            values = eigenvalues / correction[:, None]
            return inverse_root(values, eigenvectors, exponent, self.eps)
