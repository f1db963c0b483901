"""AdamW and AlgoPerf's NAdamW, as a rule: for 1-D parameters (section 4.4) and as a baseline."""

from __future__ import annotations

from torch import Tensor

from ..buckets import Stack
from ..fused import adam_
from .base import Hyper, Rule


class Adam(Rule):
    """U = M^ / (sqrt(D^) + eps), no factors."""

    has_factors = False

    def update(self, stack: Stack, g: Tensor, h: Hyper) -> None:
        m, d = stack.state["exp_avg"], stack.state["exp_avg_sq"]
        adam_(g, m, d, h.c1, h.c2, h.beta1, h.beta2, h.eps, h.nadam)
