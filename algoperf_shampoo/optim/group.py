"""One parameter group as the step loop sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import gpu
from .blocks.factors import FactorSet, build_factor_sets
from .blocks.layout import Layout, Stack
from .blocks.partition import cut
from .blocks.state_dict import GroupState
from .gpu.graphs import Recorder
from .gpu.triton_ops import TritonOperations
from .journal import Journal
from .nonfinite import Guard
from .ops import Operations
from .rule import AdamRule, Rule

ADAM = AdamRule()
MAX_DIM = 1024  # a dimension above is cut, unless max_preconditioner_dim says otherwise


@dataclass
class Group:
    """One parameter group laid out in stacks: which rule takes which, and all their factors.

    with_factors: stacks of rules that have factors.
    state: as it stands in ``optimizer.state``.
    recorder: on one GPU, runs steps in which all parameters take part; by_kernels: computes them,
    where our kernels work, and ``by_torch`` all others.
    guard: knows which gradients are not to be learnt from.
    options: those in use, but for the learning rate: whether they changed.
    """

    layout: Layout
    rules: list[tuple[Rule, list[Stack]]]
    with_factors: list[Stack]
    factor_sets: list[FactorSet]
    state: GroupState
    recorder: Recorder | None
    by_kernels: TritonOperations | None
    by_torch: Operations
    guard: Guard
    options: dict[str, Any]


def lay_out(
    options: dict[str, Any],
    seen: dict[str, Any],
    rule: Rule,
    first: int,
    journal: Journal,
    cuda_graph: bool,
) -> Group:
    """A parameter group, its state as before the first step.

    Args:
        options: of the group, its parameters among them; seen: those to compare with later.
        first: number of its first parameter, for messages.
        journal: where what its operations change is entered.
        cuda_graph: whether steps may be recorded.
    """
    limit = options.get("max_preconditioner_dim", MAX_DIM)
    small = options.get("small_matrices", "vector")
    layout = Layout(options["params"], lambda p: cut(tuple(p.shape), limit, small), first)
    by_rule: dict[int, tuple[Rule, list[Stack]]] = {}
    for stack in layout.stacks:
        mine = rule_for(stack.shape, rule, options.get("one_dim", "full"))
        by_rule.setdefault(id(mine), (mine, []))[1].append(stack)
    rules = list(by_rule.values())
    with_factors = [s for r, stacks in rules if r.has_factors for s in stacks]
    sets = build_factor_sets(with_factors)
    rule_of = {id(s): r for r, stacks in rules for s in stacks}
    layout.allocate(
        lambda s: rule_of[id(s)].moments,
        lambda s: rule.work_buffers_of(len(s.shape)),
        lambda s: rule_of[id(s)].vectors,
    )
    kinds = {(s.device, s.dtype) for s in layout.stacks}
    recorder = by_kernels = None
    if len(kinds) == 1:
        ((device, dtype),) = kinds
        if device.type == "cuda":
            recorder = Recorder(device, cuda_graph, journal)
            if gpu.multiplies(dtype, device):
                by_kernels = TritonOperations(layout.stacks, journal.once)
                layout.row_absmax = by_kernels.row_absmax_of_gradients
    return Group(
        layout,
        rules,
        with_factors,
        sets,
        GroupState(layout, sets),
        recorder,
        by_kernels,
        Operations(journal.once),
        Guard(layout),
        seen,
    )


def rule_for(shape: tuple[int, ...], rule: Rule, one_dim: str) -> Rule:
    """A 1x1 factor has one direction: every rule of the family is Adam there."""
    kept = {"full": True, "adam": len(shape) > 1, "only": len(shape) == 1}[one_dim]
    plain = shape == (1,) or not kept
    return ADAM if plain else rule
