"""What a preconditioner rule is: a few pure functions on a stack of blocks.

The step loop (:mod:`algoperf_shampoo.optim.kronecker`) owns everything rules share: gathering
gradients, the precision of products, deciding when to refresh, decomposing factors, weight decay,
writing parameters. A rule says which statistics it keeps and how they turn a gradient into an
update direction. The interface is wide enough for the relatives as well: SOAP and KL-Shampoo update
their statistics after the parameters (``statistics_first = False``), and keep moments in the
rotated basis, which :meth:`Rule.leave` and :meth:`Rule.enter` move when the basis changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from ..buckets import Stack
from ..linalg import gram_ema_


class Hyper(NamedTuple):
    """Hyperparameters of one stack at one step, the paper's symbols beside."""

    lr: float | Tensor  # alpha_t
    beta1: float
    beta2: float
    eps: float  # epsilon
    weight_decay: float  # lambda
    nadam: bool  # numerator beta1 M + (1 - beta1) G instead of M
    matmul_precision: str  # of the products of `update`; `accumulate` runs at "highest"
    c1: float | Tensor = 1.0  # 1 - beta1^t: a number, or a tensor [] or [B, 1, ..., 1]
    c2: float | Tensor = 1.0  # 1 - beta2^t


class Rule(ABC):
    """Turns gradients into update directions for stacks of blocks of any order."""

    statistics_first: bool = True
    has_factors: bool = True
    # State tensors shaped like the blocks, zero at first: ``stack.state[name]``, [B, *shape].
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def accumulate(self, stack: Stack, g: Tensor, h: Hyper) -> None:
        """Update ``stack.factors`` with gradients g [B, *shape]: Eq. 15 unless overridden."""
        for mode, factor in enumerate(stack.factors):
            gram_ema_(factor, g, mode, h.beta2, 1 - h.beta2)

    @abstractmethod
    def update(self, stack: Stack, g: Tensor, h: Hyper) -> None:
        """Update ``stack.state`` and replace g [B, *shape] by the direction U: W <- W - lr * U."""

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        """What is kept of a new eigendecomposition, [N, n, n]: by default the eigenvectors.

        eigenvalues [N, n] ascending and eigenvectors [N, n, n] of the factors as accumulated;
        order [N]: k of the block each factor belongs to; correction [N]: 1 - beta2^t.
        """
        return eigenvectors

    def leave(self, stack: Stack, mode: int, rows: list[int], operator: Tensor) -> None:  # noqa: B027
        """Before the operators of ``rows`` and ``mode`` change: bring what is kept in their basis
        back.

        operator: the old ones, [len(rows), d, d]. A rule that keeps nothing in a basis has nothing
        to do, nor has one for what stays by index (D in Algorithm 2).
        """

    def enter(self, stack: Stack, mode: int, rows: list[int], operator: Tensor) -> None:  # noqa: B027
        """After they changed: take it to the new basis, operator [len(rows), d, d]."""
