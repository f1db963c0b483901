"""Eigenvalue-corrected Shampoo: Adam in the eigenbasis of Shampoo's factors (Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..buckets import Stack
from ..linalg import rotate, rotate_back, rotate_mode
from ..precision import matmul_precision
from .base import Hyper, Rule, adam_direction


class EShampoo(Rule):
    """U = Q_L ((Q_L' M^ Q_R) / (sqrt(D^) + eps)) Q_R', D the average of (Q_L' G Q_R)^2 (Eq. 18).

    M is kept in the basis: rotating is linear, so the average of rotated gradients is the rotated
    average of gradients for as long as Q stands, and :meth:`rebase` rotates it over when Q changes.
    That saves one of the four rotations of a step and is Algorithm 2's update exactly (SOAP's
    code keeps M in the basis too, but there it is the algorithm).

    Before the first refresh Q = I and a step is AdamW's (NAdamW's) without any product.
    """

    def init(self, stack: Stack) -> None:
        stack.state["exp_avg"] = stack.zeros(*stack.shape)  # Q_L' M Q_R
        stack.state["exp_avg_sq"] = stack.zeros(*stack.shape)  # D

    def update(self, stack: Stack, g: Tensor, h: Hyper) -> Tensor:
        m, d = stack.state["exp_avg"], stack.state["exp_avg_sq"]
        if not any(stack.ready):
            return adam_direction(m, d, g, stack, h)
        with matmul_precision(h.matmul_precision):
            u = adam_direction(m, d, rotate(g, stack.operators), stack, h)
            return rotate_back(u, stack.operators)

    def rebase(self, stack: Stack, mode: int, rows: Sequence[int], old: Tensor, new: Tensor) -> None:
        """M moves with the basis; D stays where it is, by index (Algorithm 2; D.2 finds that
        rotating it hurts)."""
        m = stack.state["exp_avg"]
        with matmul_precision("highest"):
            if len(rows) == len(stack):
                m.copy_(rotate_mode(m, old.mT @ new, mode))
            else:
                index = torch.tensor(rows, device=m.device)
                m.index_copy_(0, index, rotate_mode(m[index], old.mT @ new, mode))
