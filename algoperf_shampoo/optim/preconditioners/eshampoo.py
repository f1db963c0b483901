"""Eigenvalue-corrected Shampoo: Adam in the eigenbasis of Shampoo's factors (Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator

from ..ops import BasisChange, Hyper, Operations, State, Value
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

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        X = ops.rotate(G, s.bases)  # line 10
        ops.adam(X, s["exp_avg"], s["exp_avg_sq"], h, in_basis=True)  # lines 4, 11 and 12
        return ops.rotate_back(X, s.bases)  # line 13

    def rebase(self, s: State, change: BasisChange, ops: Operations) -> Iterator[None]:
        """M leaves the old basis and enters the new one; D stays where it is, by index (Algorithm
        2; D.2 finds that rotating it hurts)."""
        change.leave(s["exp_avg"])
        yield
        change.enter(s["exp_avg"])
