"""What rules compute on stacks: statistics, rotations, Adam. Here by torch, one stack at a time.

:mod:`.gpu.grouped` does the same on a GPU for all stacks at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import linalg
from .buckets import Stack
from .eigen.jobs import put, take
from .precision import matmul_precision


class Hyper(NamedTuple):
    """Hyperparameters of one step, the paper's symbols beside."""

    lr: float | Tensor  # alpha_t
    beta1: float
    beta2: float
    eps: float  # epsilon
    weight_decay: float  # lambda
    nadam: bool  # numerator beta1 M + (1 - beta1) G instead of M
    matmul_precision: str  # of rotations; statistics are float32-accurate under every setting
    # 1 - beta1^t and 1 - beta2^t as tensors [] on the device while all blocks have the same t;
    # else None, and each stack's own.
    c1: Tensor | None = None
    c2: Tensor | None = None


class Arithmetic:
    """The operations of :class:`~.preconditioners.base.Rule`, on lists of stacks.

    Tensors in ``xs`` are shaped like the stacks' blocks, [B, *shape]. They may be overwritten:
    what counts afterwards is what a method returns.
    """

    def together(self, stacks: Sequence[Stack]) -> Iterable[list[Stack]]:
        """The stacks in lists that a rule should take at a time: here one by one, so that one
        stack's temporaries are gone before the next."""
        return ([stack] for stack in stacks)

    def gradients_came(self, stacks: Sequence[Stack]) -> None:
        """``stack.g`` of all stacks holds the gradients of this step."""

    def gram_ema(self, stacks: Sequence[Stack], beta: float, weight: float) -> None:
        """factor_i <- beta factor_i + weight X_i X_i', X_i the mode-i matricization of ``g``
        (Eq. 15)."""
        for stack in stacks:
            for mode, factor in enumerate(stack.factors):
                linalg.gram_ema_(factor, stack.g, mode, beta, weight)

    def adam(self, stacks: Sequence[Stack], xs: Sequence[Tensor], h: Hyper) -> None:
        """Update exp_avg and exp_avg_sq with xs, and replace these by Adam's direction."""
        for stack, x in zip(stacks, xs, strict=True):
            m, v = stack.state["exp_avg"], stack.state["exp_avg_sq"]
            c1 = stack.bias_correction(h.beta1) if h.c1 is None else h.c1
            c2 = stack.bias_correction(h.beta2) if h.c2 is None else h.c2
            adam_(x, m, v, c1, c2, h.beta1, h.beta2, h.eps, h.nadam)

    def copy_of_gradients(self, stacks: Sequence[Stack]) -> list[Tensor]:
        """Copies of ``g``."""
        return [stack.g.clone() for stack in stacks]

    def rotate(
        self, stacks: Sequence[Stack], xs: Sequence[Tensor], h: Hyper, orthogonal: bool = True
    ) -> list[Tensor]:
        """Q_1' x_1 ... Q_k' x_k with the stacks' operators Q (Algorithm 2, line 10).

        xs: the gradients ``g``, or copies of them, which may have been changed if the operators
        are not ``orthogonal``. ``g`` may be overwritten.
        """
        return [linalg.rotate(x, s.operators) for s, x in zip(stacks, xs, strict=True)]

    def rotate_back(self, stacks: Sequence[Stack], xs: Sequence[Tensor], h: Hyper) -> None:
        """``g`` <- Q_1 x_1 ... Q_k x_k, xs being what :meth:`rotate` and :meth:`adam` made of
        ``g``."""
        for stack, x in zip(stacks, xs, strict=True):
            linalg.rotate_back(x, stack.operators, out=stack.g)

    def rotate_mode_(
        self, stack: Stack, x: Tensor, mode: int, rows: Sequence[int], back: bool
    ) -> None:
        """x[rows] <- their product in one mode with Q' (with Q if ``back``), Q the stack's
        operators. x: [B, *shape], not ``g``, which may be overwritten."""
        q = take(stack.operators[mode], rows)
        with matmul_precision("highest"):
            rotated = linalg.rotate_mode(take(x, rows), q.mT if back else q, mode)
            put(x, rows, rotated)


def adam_(
    x: Tensor,
    m: Tensor,
    v: Tensor,
    c1: float | Tensor,
    c2: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    nadam: bool,
) -> None:
    """Update both moments and replace x by Adam's direction (NAdam's numerator with ``nadam``).

    x, m, v: contiguous, one shape [B, ...] and dtype. c1, c2 = 1 - beta1^t, 1 - beta2^t: numbers,
    or tensors [] or [B, 1, ..., 1] on x's device. The order of operations is torch.optim.AdamW's,
    so that the two agree to rounding.
    """
    v.mul_(beta2).addcmul_(x, x, value=1 - beta2)
    m.lerp_(x, 1 - beta1)
    numerator = x.lerp_(m, beta1) if nadam else m
    root = c2.sqrt() if isinstance(c2, Tensor) else c2**0.5
    denominator = v.sqrt().div_(root).add_(eps).mul_(c1)
    torch.div(numerator, denominator, out=x)
