"""Eigenvalue-corrected Shampoo: Adam in the eigenbasis of Shampoo's factors (Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

from ..arithmetic import Arithmetic, Hyper
from ..buckets import Stack
from .base import Rule


class EShampoo(Rule):
    """U = Q_L ((Q_L' M^ Q_R) / (sqrt(D^) + eps)) Q_R', D the average of (Q_L' G Q_R)^2 (Eq. 18).

    M is kept in the basis: rotating is linear, so the average of rotated gradients is the rotated
    average of gradients for as long as Q stands, and M is rotated over when Q changes.
    That saves one of the four rotations of a step and is Algorithm 2's update exactly (SOAP's
    code keeps M in the basis too, but there it is the algorithm).

    exp_avg is Q_L' M Q_R, exp_avg_sq is D. Before the first refresh Q = I and a step is AdamW's
    (NAdamW's) without any product. Coordinates that hold nothing but rounding take no step
    (:mod:`..noise`).
    """

    def update(self, stacks: Sequence[Stack], h: Hyper, arithmetic: Arithmetic) -> None:
        if first := [s for s in stacks if not any(s.ready)]:
            arithmetic.adam(first, [s.g for s in first], h)
        if turned := [s for s in stacks if any(s.ready)]:
            xs = arithmetic.rotate(turned, [s.g for s in turned], h)
            arithmetic.adam_in_basis(turned, xs, h)
            arithmetic.rotate_back(turned, xs, h)

    def leave(self, stack: Stack, mode: int, rows: list[int], arithmetic: Arithmetic) -> None:
        """M leaves the old basis; D stays where it is, by index (Algorithm 2; D.2 finds that
        rotating it hurts)."""
        arithmetic.rotate_mode_(stack, stack.state["exp_avg"], mode, rows, back=True)

    def enter(self, stack: Stack, mode: int, rows: list[int], arithmetic: Arithmetic) -> None:
        arithmetic.rotate_mode_(stack, stack.state["exp_avg"], mode, rows, back=False)
