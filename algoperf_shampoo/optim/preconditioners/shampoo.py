"""Shampoo, with Adam grafting as the winning AlgoPerf submission runs it (Algorithm 3), and
without."""

from __future__ import annotations

from torch import Tensor

from ..linalg import inverse_root
from ..ops import Hyper, Operations, State, Value, bias_corrections
from ..precision import matmul_precision
from .base import Rule


class _InverseRoots(Rule):
    """A rule whose operators are roots L^-e, e = exponent_multiplier / (2k) for blocks of order k.

    Args:
        eps: epsilon added to the factors' eigenvalues.
        grafting_eps: Adam's epsilon.
    """

    roots = True
    orthogonal = False

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

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        # NAdam's numerator needs the gradient, whose place Adam's direction A takes.
        N = ops.copy(G, lambda stack: stack.based)
        A = G
        ops.adam(A, s["exp_avg"], s["exp_avg_sq"], h._replace(eps=self.grafting_eps))
        if not N.stacks:
            return A
        # The bias correction of M scales S alone, and the norm takes it out again.
        _numerator(N, s, h, ops)
        some = [i for i, stack in enumerate(A.stacks) if stack.based]
        lengths, tensors = ops.norm(A), A.tensors()
        lengths = [lengths[i] for i in some]
        # Where some rows' first root is still to come, those stay with Adam.
        adams = [None if all(A.stacks[i].ready) else tensors[i].clone() for i in some]
        S = ops.rotate(N, s.roots)
        ops.scale(S, [a / (b + 1e-16) for a, b in zip(lengths, ops.norm(S), strict=True)])
        with ops.write(S) as tensors:
            for stack, tensor, a in zip(S.stacks, tensors, adams, strict=True):
                if a is not None:
                    rows = stack.ready_rows()
                    tensor.copy_(a.index_copy_(0, rows, tensor[rows]))
        return S.over(A)


class UngraftedShampoo(_InverseRoots):
    """U = L^-1/4 M^ R^-1/4, the roots being the identity before the first ones.

    exp_avg is M; no second moment is kept, but for blocks that Adam takes.
    """

    moments = ("exp_avg",)

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        ops.ema(s["exp_avg"], G, h.beta1)
        _numerator(G, s, h, ops)
        with ops.write(G) as tensors:
            for stack, x in zip(G.stacks, tensors, strict=True):
                x.div_(bias_corrections(stack, h)[0])
        return ops.rotate(G, s.roots)


def _numerator(x: Value, s: State, h: Hyper, ops: Operations) -> None:
    """The gradient x becomes M, or beta1 M + (1 - beta1) G with ``nadam``."""
    averages = {id(stack): m for stack, m in s["exp_avg"].pairs()}
    with ops.write(x) as tensors:
        for stack, tensor in zip(x.stacks, tensors, strict=True):
            m = averages[id(stack)]
            tensor.lerp_(m, h.beta1) if h.nadam else tensor.copy_(m)
