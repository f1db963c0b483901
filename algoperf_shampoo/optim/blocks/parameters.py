"""Which parameters can be laid out in blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_parameters(params: Sequence[Tensor], first: int = 0) -> None:
    """
    Raises:
        ValueError: see :class:`.layout.Layout`.
    """
    for i, p in enumerate(params, first):
        _check_parameter(i, p)
    if len(set(params)) < len(params):
        raise ValueError("a parameter is twice in its group")


def _check_parameter(number: int, p: Tensor) -> None:
    wanted = "only dense ones of real floating-point numbers work"
    if hasattr(p, "placements") or getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"parameter {number} is sharded (by FSDP, or a DTensor); only whole ones "
            "work: train replicas (DistributedDataParallel) and give process_group, whose ranks "
            "share the optimizer's state"
        )
    if p.layout != torch.strided:
        raise ValueError(f"parameter {number} is sparse; {wanted}")
    if not p.is_floating_point():
        raise ValueError(f"parameter {number} is of {p.dtype}; {wanted}")
    if p.numel() == 0:
        raise ValueError(f"parameter {number} is empty, of shape {tuple(p.shape)}")
