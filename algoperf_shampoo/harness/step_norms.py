"""How the length of Shampoo's step depends on the size of a matrix, against Adam's (Prop. 1)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

SLOPE = "step_norm_slope"
"""Name of :func:`slope` in measurements.csv."""


def metrics(optimizer_state: Mapping[str, Any]) -> dict[str, float]:
    """What is logged at an evaluation, off the clock; {} where nothing is known."""
    found = slope(optimizer_state)
    return {} if found is None else {SLOPE: found}


def slope(optimizer_state: Mapping[str, Any]) -> float | None:
    """Least-squares slope of log(||Shampoo's step|| / ||Adam's||) on log(mn) over matrices.

    Of the optimizer's moments as they are, whose roots may be older; -1/4 by Proposition 1. Blocks
    of one or of three and more dimensions are left out. None where no optimizer of the state knows
    both lengths, or all matrices are of one size.
    """
    points = [
        (math.log(math.prod(shape)), math.log(ratio))
        for entry in optimizer_state.values()
        if hasattr(entry, "norm_ratios")
        for shape, ratio in entry.norm_ratios()
        if len(shape) == 2 and ratio > 0 and math.isfinite(ratio)
    ]
    if len({size for size, _ in points}) < 2:
        return None
    sizes, ratios = zip(*points, strict=True)
    return statistics.linear_regression(sizes, ratios).slope
