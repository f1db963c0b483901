"""What a preconditioner rule is: a few pure functions on a stack of blocks.

The step loop (:mod:`algoperf_shampoo.optim.kronecker`) owns everything rules share: gathering
gradients, deciding when to refresh, decomposing factors, weight decay, writing parameters. A rule
says which statistics it keeps and how they turn a gradient into an update direction. The interface is
wide enough for the relatives as well: SOAP and KL-Shampoo update their statistics after the
parameters (``statistics_first = False``), use their first step to initialise only
(``initialise_only = True``) and keep moments in the rotated basis, which :meth:`Rule.rebase` moves
when the basis does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..buckets import Stack
from ..linalg import gram_ema_
from ..precision import matmul_precision


class Hyper(NamedTuple):
    """Hyperparameters of one parameter group at one step, the paper's symbols beside."""

    lr: float  # alpha_t
    beta1: float
    beta2: float
    eps: float  # epsilon
    weight_decay: float  # lambda
    nadam: bool  # numerator beta1 M + (1 - beta1) G instead of M
    matmul_precision: str  # of the rotations; Grams are always "highest"


class Rule(ABC):
    """Turns gradients into update directions for stacks of blocks of any order."""

    statistics_first: bool = True
    initialise_only: bool = False
    has_factors: bool = True

    @abstractmethod
    def init(self, stack: Stack) -> None:
        """Create ``stack.state``; called once, before the first step."""

    def accumulate(self, stack: Stack, g: Tensor, h: Hyper) -> None:
        """Update ``stack.factors`` with gradients g [B, *shape]: Eq. 15 unless overridden."""
        with matmul_precision("highest"):
            for mode, factor in enumerate(stack.factors):
                gram_ema_(factor, g, mode, h.beta2, 1 - h.beta2)

    @abstractmethod
    def update(self, stack: Stack, g: Tensor, h: Hyper) -> Tensor:
        """Update ``stack.state`` and return the direction U [B, *shape]: W <- W - lr * U."""

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        """What is kept of a new eigendecomposition, [N, n, n]: by default the eigenvectors.

        eigenvalues [N, n] ascending and eigenvectors [N, n, n] of the factors as accumulated;
        order [N]: k of the block each factor belongs to; correction [N]: 1 - beta2^t.
        """
        return eigenvectors

    def rebase(self, stack: Stack, mode: int, rows: Sequence[int], old: Tensor, new: Tensor) -> None:
        """Move everything kept in a basis when the basis of ``mode`` changes, old, new [len(rows), d, d].

        The default keeps nothing in a basis, or, as Algorithm 2 has it for D, leaves it by index.
        """


def adam_direction(
    m: Tensor, v: Tensor, g: Tensor, stack: Stack, h: Hyper, eps: float | None = None
) -> Tensor:
    """Update both moments in place; return Adam's (or NAdam's) direction. All [B, *shape].

    The operations are in torch.optim.AdamW's order, so that the two agree to rounding.
    """
    v.mul_(h.beta2).addcmul_(g, g, value=1 - h.beta2)
    numerator = nadam_numerator(m, g, h)
    correction2 = stack.bias_correction(h.beta2)
    root = correction2**0.5 if isinstance(correction2, float) else correction2.sqrt()
    denominator = v.sqrt().div_(root).add_(h.eps if eps is None else eps)
    denominator.mul_(stack.bias_correction(h.beta1))
    return torch.div(numerator, denominator, out=denominator)


def nadam_numerator(m: Tensor, g: Tensor, h: Hyper) -> Tensor:
    """m <- beta1 m + (1 - beta1) g; return m, or with NAdam beta1 m + (1 - beta1) g of the new m."""
    m.lerp_(g, 1 - h.beta1)
    return torch.lerp(g, m, h.beta1) if h.nadam else m
