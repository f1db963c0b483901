"""One parameter group as the step loop sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .blocks.factors import FactorSet
from .blocks.layout import Layout, Stack
from .blocks.state_dict import GroupState
from .gpu.graphs import Recorder
from .gpu.triton_ops import TritonOperations
from .nonfinite import Guard
from .ops.torch_ops import TorchOperations
from .rule import Rule


@dataclass
class Group:
    """One parameter group laid out in stacks: which rule takes which, and all their factors.

    state: as it stands in ``optimizer.state``.
    recorder: on one GPU, runs steps in which all parameters take part; by_kernels: computes them,
    where our kernels work, and ``by_torch`` all others.
    guard: knows which gradients are not to be learnt from.
    options: those in use, but for the learning rate: whether they changed.
    """

    layout: Layout
    rules: list[tuple[Rule, list[Stack]]]
    factor_sets: list[FactorSet]
    state: GroupState
    recorder: Recorder | None
    by_kernels: TritonOperations | None
    by_torch: TorchOperations
    guard: Guard
    options: dict[str, Any]
