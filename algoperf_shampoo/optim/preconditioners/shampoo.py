"""Shampoo with Adam grafting, as the winning AlgoPerf submission runs it (Algorithm 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arithmetic import Arithmetic, Hyper
from ..buckets import Stack
from ..linalg import inverse_root
from ..precision import matmul_precision
from .base import Rule


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

    def update(self, stacks: Sequence[Stack], h: Hyper, arithmetic: Arithmetic) -> None:
        rooted = [s for s in stacks if any(s.ready)]
        # NAdam's numerator needs the gradient, whose place Adam's direction A takes.
        numerators = arithmetic.copy_of_gradients(rooted)
        arithmetic.adam(stacks, [s.g for s in stacks], h._replace(eps=self.grafting_eps))
        if not rooted:
            return
        for stack, x in zip(rooted, numerators, strict=True):
            # The bias correction of M scales S alone, and the norm takes it out again.
            m = stack.state["exp_avg"]
            x.lerp_(m, h.beta1) if h.nadam else x.copy_(m)
        lengths = [_norm(s.g) for s in rooted]
        # Where some rows' first root is still to come, those stay with Adam.
        adams = [None if all(s.ready) else s.g.clone() for s in rooted]
        # Roots are symmetric: rotating, by the transpose, applies them as they are.
        roots = arithmetic.rotate(rooted, numerators, h, orthogonal=False)
        for stack, s, length, a in zip(rooted, roots, lengths, adams, strict=True):
            s.mul_(length / (_norm(s) + 1e-16))
            if a is None:
                stack.g.copy_(s)
            else:
                rows = stack.ready_rows()
                stack.g.copy_(a.index_copy_(0, rows, s[rows]))

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        exponent = self.exponent_multiplier / (2 * order)
        with matmul_precision("highest"):
            values = eigenvalues / correction[:, None]
            return inverse_root(values, eigenvectors, exponent, self.eps)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each row of [B, ...], as [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
