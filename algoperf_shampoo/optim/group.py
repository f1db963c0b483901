"""One parameter group as the step loop sees it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from . import gpu, sharding
from .blocks.factors import FactorSet, build_factor_sets
from .blocks.layout import Layout, Stack
from .blocks.parameters import check_parameters
from .blocks.partition import Block, cut
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
    shard: whose blocks these are, where ranks share the work.
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
    shard: sharding.Shard
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
    shard: sharding.Sharding = "off",
    process_group: dist.ProcessGroup | None = None,
) -> Group:
    """A parameter group, its state as before the first step.

    Args:
        options: of the group, its parameters among them; seen: those to compare with later.
        first: number of its first parameter, for messages.
        journal: where what its operations change is entered.
        cuda_graph: whether steps may be recorded.
        shard, process_group: whether the processes of the group share the work.
    """
    limit = options.get("max_preconditioner_dim", MAX_DIM)
    small = options.get("small_matrices", "vector")
    check_parameters(options["params"], first)
    rule_of = functools.partial(rule_for, rule=rule, one_dim=options.get("one_dim", "full"))

    def has_factors(shape: tuple[int, ...]) -> bool:
        return rule_of(shape).has_factors

    def blocks(p: Tensor) -> list[Block]:
        return cut(tuple(p.shape), limit, small)

    shapes = [(b.shape, has_factors(b.shape)) for p in options["params"] for b in blocks(p)]
    frequency = options.get("precondition_frequency", 1)
    part = sharding.place(shard, process_group, shapes, frequency)
    owners = functools.partial(sharding.owners, has_factors=has_factors, ranks=part.ranks)
    layout = Layout(
        options["params"], blocks, first, owners if part.shared else None, part.rank, part.ranks
    )
    by_rule: dict[int, tuple[Rule, list[Stack]]] = {}
    for stack in layout.stacks:
        mine = rule_of(stack.shape)
        by_rule.setdefault(id(mine), (mine, []))[1].append(stack)
    rules = list(by_rule.values())
    with_factors = [s for r, stacks in rules if r.has_factors for s in stacks]
    sets = build_factor_sets(with_factors)
    others = _factor_sets_of_others(layout, has_factors)
    layout.allocate(
        lambda s: rule_of(s.shape).moments,
        lambda s: rule.work_buffers_of(len(s.shape)),
        lambda s: rule_of(s.shape).vectors,
    )
    kinds = {(s.device, s.dtype) for s in layout.everywhere}
    recorder = by_kernels = None
    if len(kinds) == 1:
        ((device, dtype),) = kinds
        if device.type == "cuda":
            # A rank without blocks has nothing to record, but changes parameters as the others do.
            recorder = Recorder(device, cuda_graph and bool(layout.stacks), journal)
            if gpu.multiplies(dtype, device):
                by_kernels = TritonOperations(layout.stacks, journal.once, layout.others)
                layout.row_absmax = by_kernels.row_absmax_of_gradients
    return Group(
        layout,
        rules,
        with_factors,
        sets,
        part,
        GroupState(layout, sets, others),
        recorder,
        by_kernels,
        Operations(journal.once),
        Guard(layout),
        seen,
    )


def _factor_sets_of_others(
    layout: Layout, has_factors: Callable[[tuple[int, ...]], bool]
) -> list[FactorSet]:
    """By rank, as that rank has them, but without memory."""
    sets = []
    for _, stacks in itertools.groupby(layout.others, key=lambda s: s.owner):
        sets += build_factor_sets([s for s in stacks if has_factors(s.shape)], elsewhere=True)
    return sets


def rule_for(shape: tuple[int, ...], rule: Rule, one_dim: str) -> Rule:
    """A 1x1 factor has one direction: every rule of the family is Adam there."""
    kept = {"full": True, "adam": len(shape) > 1, "only": len(shape) == 1}[one_dim]
    plain = shape == (1,) or not kept
    return ADAM if plain else rule
