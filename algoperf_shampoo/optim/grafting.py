"""Any rule's direction with the length of Adam's (Eq. 7), for ablations.

Algorithm 3 itself is :class:`.shampoo.GraftedShampoo`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .ops import BasisChange, Hyper, Operations, State, Value
from .rule import Rule


class Grafted(Rule):
    """U = S ||A|| / (||S|| + 1e-16), S the inner rule's direction and A Adam's; norms per block.

    Its moments, graft_avg and graft_avg_sq, are in the parameters' coordinates.

    Args:
        adam_first: Adam itself where a block's first operators are still to come.
    """

    def __init__(self, inner: Rule, grafting_eps: float, adam_first: bool = False) -> None:
        self.inner = inner
        self.grafting_eps = grafting_eps
        self.adam_first = adam_first
        for name in (
            *("has_factors", "statistics_first", "refresh_last", "orthogonal", "roots"),
            *("vectors", "starts", "eigenvalues_at_checks", "adam_eps"),
        ):
            setattr(self, name, getattr(inner, name))
        self.moments = (*inner.moments, "graft_avg", "graft_avg_sq")

    def work_buffers_of(self, order: int) -> int:
        return self.inner.work_buffers_of(order) + 1

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        A = ops.copy(G)
        ops.adam(A, s["graft_avg"], s["graft_avg_sq"], h._replace(eps=self.grafting_eps))
        lengths = ops.norm(A)
        adams = [
            x.clone() if self.adam_first and not all(stack.ready) else None
            for stack, x in A.pairs()
        ]
        U = self.inner.direction(G, s, h, ops)
        ops.scale(U, [a / (b + 1e-16) for a, b in zip(lengths, ops.norm(U), strict=True)])
        if any(a is not None for a in adams):
            with ops.write(U) as tensors:
                for stack, x, a in zip(U.stacks, tensors, adams, strict=True):
                    if a is not None and stack.based:
                        rows = stack.ready_rows()
                        a.index_copy_(0, rows, x[rows])
                    if a is not None:
                        x.copy_(a)
        return U

    def accumulate(self, G: Value, s: State, h: Hyper, ops: Operations) -> None:
        self.inner.accumulate(G, s, h, ops)

    def start(self, G: Value, s: State, h: Hyper, ops: Operations) -> None:
        self.inner.start(G, s, h, ops)

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        return self.inner.operator(eigenvalues, eigenvectors, order, correction)

    def rebase(self, s: State, change: BasisChange, ops: Operations) -> Iterator[None]:
        return self.inner.rebase(s, change, ops)

    def keep(self, s: State, change: BasisChange, ops: Operations) -> None:
        self.inner.keep(s, change, ops)


def grafted(
    rule: Rule, grafting: str | None, grafting_eps: float, adam_first: bool = False
) -> Rule:
    """The rule, or with grafting "adam" its grafted one."""
    return rule if grafting is None else Grafted(rule, grafting_eps, adam_first)
