"""Eigenvalue-corrected Shampoo: Adam in the eigenbasis of Shampoo's factors (Algorithm 2)."""

from __future__ import annotations

from torch import Tensor

from ..buckets import Stack
from ..eigensolvers import put, take
from ..fused import adam_
from ..linalg import rotate, rotate_back, rotate_mode
from ..precision import matmul_precision
from .base import Hyper, Rule


class EShampoo(Rule):
    """U = Q_L ((Q_L' M^ Q_R) / (sqrt(D^) + eps)) Q_R', D the average of (Q_L' G Q_R)^2 (Eq. 18).

    M is kept in the basis: rotating is linear, so the average of rotated gradients is the rotated
    average of gradients for as long as Q stands, and M is rotated over when Q changes.
    That saves one of the four rotations of a step and is Algorithm 2's update exactly (SOAP's
    code keeps M in the basis too, but there it is the algorithm).

    exp_avg is Q_L' M Q_R, exp_avg_sq is D. Before the first refresh Q = I and a step is AdamW's
    (NAdamW's) without any product.
    """

    def update(self, stack: Stack, g: Tensor, h: Hyper) -> None:
        m, d = stack.state["exp_avg"], stack.state["exp_avg_sq"]
        if not any(stack.ready):
            adam_(g, m, d, h.c1, h.c2, h.beta1, h.beta2, h.eps, h.nadam)
            return
        x = rotate(g, stack.operators)
        adam_(x, m, d, h.c1, h.c2, h.beta1, h.beta2, h.eps, h.nadam)
        rotate_back(x, stack.operators, out=g)

    def leave(self, stack: Stack, mode: int, rows: list[int], operator: Tensor) -> None:
        """M leaves the old basis; D stays where it is, by index (Algorithm 2; D.2 finds that
        rotating it hurts)."""
        self._rotate(stack, mode, rows, operator.mT)

    def enter(self, stack: Stack, mode: int, rows: list[int], operator: Tensor) -> None:
        self._rotate(stack, mode, rows, operator)

    @staticmethod
    def _rotate(stack: Stack, mode: int, rows: list[int], q: Tensor) -> None:
        m = stack.state["exp_avg"]
        with matmul_precision("highest"):
            put(m, rows, rotate_mode(take(m, rows), q, mode))
