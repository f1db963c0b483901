"""Shampoo, with Adam grafting as the winning AlgoPerf submission runs it (Algorithm 3), and
without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arithmetic import Arithmetic, Hyper, bias_corrections
from ..buckets import Stack
from ..linalg import inverse_root
from ..precision import matmul_precision
from .base import Rule


class _InverseRoots(Rule):
    """A rule whose operators are roots L^-e, e = exponent_multiplier / (2k) for blocks of order k.

    Args:
        eps: epsilon added to the factors' eigenvalues.
        grafting_eps: Adam's epsilon.
    """

    roots = True

    def __init__(self, eps: float, grafting_eps: float, exponent_multiplier: float = 1.0) -> None:
        self.eps = eps
        self.grafting_eps = grafting_eps
        self.exponent_multiplier = exponent_multiplier

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        exponent = self.exponent_multiplier / (2 * order)
        with matmul_precision("highest"):
            values = eigenvalues / correction[:, None]
            return inverse_root(values, eigenvectors, exponent, self.eps)


class GraftedShampoo(_InverseRoots):
    """U = S ||A|| / (||S|| + 1e-16), S = L^-1/4 M^ R^-1/4, A = Adam's direction; norms per block.

    Pure Adam before the first roots.
    """

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


class UngraftedShampoo(_InverseRoots):
    """U = L^-1/4 M^ R^-1/4, the roots being the identity before the first ones.

    exp_avg is M; no second moment is kept, but for blocks that Adam takes.
    """

    moments = ("exp_avg",)

    def update(self, stacks: Sequence[Stack], h: Hyper, arithmetic: Arithmetic) -> None:
        xs = arithmetic.copy_of_gradients(stacks)
        arithmetic.average(stacks, xs, h)
        for stack, x in zip(stacks, xs, strict=True):
            m = stack.state["exp_avg"]
            x.lerp_(m, h.beta1) if h.nadam else x.copy_(m)
            c1, _ = bias_corrections(stack, h)
            x.div_(c1)
        # Roots are symmetric: rotating, by the transpose, applies them as they are.
        rooted = [(s, x) for s, x in zip(stacks, xs, strict=True) if any(s.ready)]
        some, numerators = [s for s, _ in rooted], [x for _, x in rooted]
        roots = arithmetic.rotate(some, numerators, h, orthogonal=False) if some else []
        results = {id(s): x for s, x in zip(some, roots, strict=True)}
        for stack, x in zip(stacks, xs, strict=True):
            stack.g.copy_(results.get(id(stack), x))


def _norm(x: Tensor) -> Tensor:
    """Frobenius norm of each row of [B, ...], as [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
