"""AdamW and AlgoPerf's NAdamW, as a rule: for 1-D parameters (section 4.4) and as a baseline."""

from __future__ import annotations

from ..ops import Hyper, Operations, State, Value
from .base import Rule


class Adam(Rule):
    """U = M^ / (sqrt(D^) + eps), no factors."""

    has_factors = False
    work_buffers = 0

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        ops.adam(G, s["exp_avg"], s["exp_avg_sq"], h)
        return G
