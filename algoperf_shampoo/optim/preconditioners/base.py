"""What a preconditioner rule is: a few functions on stacks of blocks.

The step loop (:mod:`algoperf_shampoo.optim.kronecker`) owns everything rules share: gathering
gradients, deciding when to refresh, decomposing factors, weight decay, writing parameters. A rule
says which statistics it keeps and how they turn a gradient into an update direction, in operations
of :class:`~algoperf_shampoo.optim.arithmetic.Arithmetic`. The interface is wide enough for the
relatives as well: SOAP and KL-Shampoo update their statistics after the parameters
(``statistics_first = False``), and keep moments in the rotated basis, which :meth:`Rule.leave` and
:meth:`Rule.enter` move when the basis changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ..arithmetic import Arithmetic, Hyper
from ..buckets import Stack


class Rule(ABC):
    """Turns gradients into update directions for stacks of blocks of any order."""

    statistics_first: bool = True
    has_factors: bool = True
    roots: bool = False  # whether operators are roots, which an all-zero factor has too
    # State tensors shaped like the blocks, zero at first: ``stack.state[name]``, [B, *shape].
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def accumulate(self, stacks: Sequence[Stack], h: Hyper, arithmetic: Arithmetic) -> None:
        """Update the factors with the gradients ``g`` [B, *shape]: Eq. 15 unless overridden."""
        arithmetic.gram_ema(stacks, h.beta2, 1 - h.beta2)

    @abstractmethod
    def update(self, stacks: Sequence[Stack], h: Hyper, arithmetic: Arithmetic) -> None:
        """Update ``state`` and replace ``g`` [B, *shape] by the direction U: W <- W - lr * U."""

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        """What is kept of a new eigendecomposition, [N, n, n]: by default the eigenvectors.

        eigenvalues [N, n] ascending and eigenvectors [N, n, n] of the factors as accumulated;
        order [N]: k of the block each factor belongs to; correction [N]: 1 - beta2^t.
        """
        return eigenvectors

    def leave(  # noqa: B027
        self, stack: Stack, mode: int, rows: list[int], arithmetic: Arithmetic
    ) -> None:
        """Before the operators of ``rows`` and ``mode`` change: bring what is kept in their basis
        back.

        A rule that keeps nothing in a basis has nothing to do, nor has one for what stays by index
        (D in Algorithm 2).
        """

    def enter(  # noqa: B027
        self, stack: Stack, mode: int, rows: list[int], arithmetic: Arithmetic
    ) -> None:
        """After they changed: take it to the new basis."""
