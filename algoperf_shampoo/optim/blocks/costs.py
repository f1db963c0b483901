"""What the factors of a parameter cost in memory, where nobody would expect it."""

from __future__ import annotations

import warnings
from typing import Any

from .layout import Layout

# Warned of are factors that take this many times what AdamW keeps of their parameter, and so much
# at all.
TIMES_ADAM = 16
LEAST_BYTES = 64 * 2**20


def warn(layout: Layout, options: dict[str, Any]) -> None:
    """One warning for the most expensive parameter of a group, if it is out of proportion.

    A matrix of 50257 x 16 is cut along its long side into 49 blocks of 1024 x 16, each with a
    factor of 1024 x 1024: 128 times the parameter.
    """
    costs = [0] * len(layout.params)
    for stack in layout.everywhere:
        if stack.factors:
            a_block = 2 * stack.dtype.itemsize * sum(d * d for d in stack.shape)
            for member in stack.members:
                costs[member.param] += a_block
    dear = []
    for p, cost in zip(layout.params, costs, strict=True):
        if cost >= max(LEAST_BYTES, TIMES_ADAM * 2 * 4 * p.numel()):
            dear.append((cost, p))
    if not dear:
        return
    cost, p = max(dear, key=lambda x: x[0])
    others = f" (and those of {len(dear) - 1} more)" if len(dear) > 1 else ""
    vector = sum(d != 1 for d in p.shape) <= 1
    way = 'one_dim="adam"' if vector else "a smaller max_preconditioner_dim"
    limit = options["max_preconditioner_dim"]
    warnings.warn(
        f"the factors of a parameter of shape {tuple(p.shape)}{others} take "
        f"{cost / 2**20:,.0f} MiB, {cost / (4 * p.numel()):,.0f} times the parameter: its long "
        f"dimension is cut into pieces of max_preconditioner_dim = {limit}; {way} for its "
        "parameter group makes them small",
        stacklevel=6,
    )
