"""AdamW and AlgoPerf's NAdamW, as a rule: for 1-D parameters (section 4.4) and as a baseline."""

from __future__ import annotations

from torch import Tensor

from ..buckets import Stack
from .base import Hyper, Rule, adam_direction


class Adam(Rule):
    """U = M^ / (sqrt(D^) + eps), no factors."""

    has_factors = False

    def init(self, stack: Stack) -> None:
        stack.state["exp_avg"] = stack.zeros(*stack.shape)  # M
        stack.state["exp_avg_sq"] = stack.zeros(*stack.shape)  # D

    def update(self, stack: Stack, g: Tensor, h: Hyper) -> Tensor:
        return adam_direction(stack.state["exp_avg"], stack.state["exp_avg_sq"], g, stack, h)
