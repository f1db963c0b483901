"""AdamW and AlgoPerf's NAdamW, as a rule: for 1-D parameters (section 4.4) and as a baseline."""

from __future__ import annotations

from collections.abc import Sequence

from ..arithmetic import Arithmetic, Hyper
from ..buckets import Stack
from .base import Rule


class Adam(Rule):
    """U = M^ / (sqrt(D^) + eps), no factors."""

    has_factors = False

    def update(self, stacks: Sequence[Stack], h: Hyper, arithmetic: Arithmetic) -> None:
        arithmetic.adam(stacks, [s.g for s in stacks], h)
