"""Several ranks share the work of one optimizer: each block is kept by one of them.

The ranks hold replicas of the parameters and see the same reduced gradients. A block's owner keeps
its factors, bases and moments, learns its gradient, refreshes its bases when they are due, and
computes its update direction; then the directions are gathered, and every rank changes all
parameters alike. So a step has one collective, and a refresh none: owners decide and decompose at
the same time. Rules, operations and kernels see stacks of own blocks and know nothing of it.

Which gradients are not to be learnt from every rank finds for itself (:mod:`.nonfinite`): all ranks
gather all gradients, as a single one does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from .blocks.factors import FactorSet
from .blocks.layout import Layout, Member, Stack
from .blocks.state_dict import COUNTERS, tensors_of
from .eigen.cusolver import milliseconds
from .eigen.solver import Solver
from .options import Sharding

CHOICES = get_args(Sharding)

# What a decision is made from that must be the same on every machine: arithmetic per millisecond of
# float32-accurate products, bytes per millisecond between GPUs of one host, and what a collective
# takes at least, all of an H100's order.
FLOP_PER_MS = 5e10
BYTES_PER_MS = 1e8
COLLECTIVE_MS = 0.1
# Entries weigh this much beside arithmetic when blocks are given out: the parts that are gathered
# are as long as the longest.
WEIGHT_OF_ENTRIES = 0.25
ROOM_MIB = 1024  # beyond it a refresh gains nothing
PIECE_BYTES = 2**26  # of state sent at a time
COLUMNS = 1009  # of sums that replicas are compared by; a prime, which no row of a matrix is


@dataclass(frozen=True)
class Shard:
    """A process's place among those that share the work: ``rank`` of ``ranks`` in ``group``."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    ranks: int = 1

    @property
    def shared(self) -> bool:
        return self.ranks > 1


ALONE = Shard()


def place(
    sharding: Sharding,
    group: dist.ProcessGroup | None,
    shapes: Sequence[tuple[tuple[int, ...], bool]],
    frequency: int,
) -> Shard:
    """This process's, alone if there are no others or sharing does not pay.

    Args:
        shapes: of all blocks of a parameter group, and whether they have factors.
        frequency: F.
    """
    if group is None or not shapes or sharding == "off":
        return ALONE
    if (ranks := dist.get_world_size(group)) == 1:
        return ALONE
    if sharding == "auto" and not pays(shapes, frequency, ranks):
        return ALONE
    return Shard(group, dist.get_rank(group), ranks)


def pays(shapes: Sequence[tuple[tuple[int, ...], bool]], frequency: int, ranks: int) -> bool:
    """Whether ranks save more per step than gathering the directions takes, by shapes alone.

    The rank that keeps the dearest block does as much as that one takes, however many there are,
    and what is gathered is as long as if all kept as much as the fullest.
    """
    sizes: dict[int, int] = {}
    flop = entries = largest = cubes = dearest = 0
    for shape, has_factors in shapes:
        numel = math.prod(shape)
        entries += numel
        largest = max(largest, numel)
        mine = sum(n**3 for n in shape) if has_factors else 0
        cubes += mine
        dearest = max(dearest, mine)
        for n in shape if has_factors else ():
            sizes[n] = sizes.get(n, 0) + 1
            flop += 3 * 2 * numel * n  # one Gram, to and fro
    if not cubes:
        return False
    refresh = sum(milliseconds(n, count) for n, count in sizes.items())
    busiest = max(1 / ranks, dearest / cubes)
    saved = (refresh / frequency + flop / FLOP_PER_MS) * (1 - busiest)
    part = max(entries / ranks, largest)
    return saved > COLLECTIVE_MS + 4 * part * (ranks - 1) / BYTES_PER_MS


def owners(
    members: Sequence[Member], has_factors: Callable[[tuple[int, ...]], bool], ranks: int
) -> list[int]:
    """Per block, its rank: the dearest first, each to the rank that has least to do by then.

    A block costs sum n_i^3, its decompositions; those without factors fill up what is even.
    """
    costs = [sum(n**3 for n in m.block.shape) if has_factors(m.block.shape) else 0 for m in members]
    entries = [m.block.numel for m in members]
    all_costs, all_entries = max(1, sum(costs)), sum(entries)
    loads = [0.0] * ranks
    found = [0] * len(members)
    for i in sorted(range(len(members)), key=lambda i: (-costs[i], -entries[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += costs[i] / all_costs + WEIGHT_OF_ENTRIES * entries[i] / all_entries
        found[i] = rank
    return found


def roomier(solver: Solver, layout: Layout) -> Solver:
    """The solver, with as much memory for a refresh as others keep factors and bases in.

    cuSOLVER's batches take as long for ten matrices as for a hundred, if these fit: with fewer
    matrices a rank gains little unless it can decompose all sizes at the same time. Its peak is
    that of a rank that keeps everything.
    """
    elsewhere = sum(
        2 * len(s) * sum(n * n for n in s.shape) * s.dtype.itemsize
        for s in layout.others
        if s.factors
    )
    return replace(solver, workspace_mib=solver.workspace_mib + min(elsewhere // 2**20, ROOM_MIB))


def exchange(layout: Layout, shard: Shard) -> None:
    """The directions of all blocks into ``g``, from their owners."""
    for everything, own in layout.shared:
        part = own if own.is_cuda else own.clone()  # gloo does not say that the two may overlap
        _all_gather(everything, part, shard.group)


def _all_gather(to: Tensor, part: Tensor, group: dist.ProcessGroup | None) -> None:
    """Every rank's part, one after the other, into ``to``."""
    # The name until torch 2.12.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(to, part, group=group)


def gather_state(
    layout: Layout,
    sets: Sequence[FactorSet],
    others: Sequence[FactorSet],
    shard: Shard,
    to: int | None,
) -> None:
    """What the other ranks keep into the tensors of :attr:`.Layout.others`, on the host.

    Pieces of PIECE_BYTES pass through the device; the host gets as much as they keep. All ranks
    learn the counters.

    Args:
        sets, others: factor sets of the own blocks, and of each other rank's, by rank.
        to: rank that receives; None: all do.
    """
    for owner in range(shard.ranks):
        for stack in layout.everywhere:
            if stack.owner == owner:
                for tensors, key in tensors_of(stack):
                    if owner == shard.rank:
                        _send(tensors[key], to, shard)
                    elif to is None or to == shard.rank:
                        tensors[key] = _receive(stack, tensors[key], owner, to, shard)
    gather_counters(layout, sets, others, shard)


def gather_counters(
    layout: Layout, sets: Sequence[FactorSet], others: Sequence[FactorSet], shard: Shard
) -> None:
    """All ranks learn the counters of all blocks, and which are ready; waits for the device."""
    for owner in range(shard.ranks):
        _tell_counters(layout, sets if owner == shard.rank else others, owner, shard)


def _pieces(x: Tensor) -> Iterable[Tensor]:
    rows = max(1, PIECE_BYTES // max(1, x[0].numel() * x.element_size()))
    yield from x.split(rows)


def _send(x: Tensor, to: int | None, shard: Shard) -> None:
    for piece in _pieces(x):
        if to is None:
            dist.broadcast(piece, _global(shard, shard.rank), group=shard.group)
        elif to != shard.rank:
            dist.send(piece, _global(shard, to), group=shard.group)


def _receive(stack: Stack, like: Tensor, owner: int, to: int | None, shard: Shard) -> Tensor:
    on_gpu = stack.device.type != "cpu"
    host = torch.empty(like.shape, dtype=like.dtype, pin_memory=on_gpu)
    for piece in _pieces(host):
        here = torch.empty_like(piece, device=stack.device) if on_gpu else piece
        if to is None:
            dist.broadcast(here, _global(shard, owner), group=shard.group)
        else:
            dist.recv(here, _global(shard, owner), group=shard.group)
        if on_gpu:
            piece.copy_(here)
    return host


def _tell_counters(layout: Layout, sets: Sequence[FactorSet], owner: int, shard: Shard) -> None:
    stacks = [s for s in layout.everywhere if s.owner == owner]
    mine = [s for s in sets if s.spans[0].stack.owner == owner]
    lists: list[list[Any]] = [s.ready for s in stacks]
    lists += [getattr(s, name) for s in mine for name in COUNTERS]
    values = torch.tensor(
        [int(x) for numbers in lists for x in numbers],
        dtype=torch.int64,
        device=layout.params[0].device,
    )
    if len(values):
        dist.broadcast(values, _global(shard, owner), group=shard.group)
    if owner != shard.rank:
        told = iter(values.tolist())
        for numbers in lists:
            kind = type(numbers[0])
            numbers[:] = [kind(next(told)) for _ in numbers]


def _global(shard: Shard, rank: int) -> int:
    assert shard.group is not None
    return dist.get_global_rank(shard.group, rank)


class Comparison:
    """Whether replicas saw the same gradients, and hold the same parameters, to the bit.

    Gradients are compared every F steps, without waiting for the device. What is between blocks in
    the buffer, and of parameters without a gradient, is not: a refresh works there.

    Attributes:
        steps: taken in this process. Which these are must not depend on what may differ.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._differed: Tensor | None = None

    def due(self, frequency: int) -> bool:
        """Whether gradients are compared in the next step."""
        return (self.steps + 1) % frequency == 0

    def gradients(self, layout: Layout, present: Sequence[bool], group: dist.ProcessGroup) -> None:
        """Compare those that are gathered, of the parameters that are present: they are read once,
        8 bytes a stack and rank are sent."""
        stacks = sorted(layout.everywhere, key=lambda s: s.owner)  # as on every rank
        sums = [_bits(_of_present(stack, present)) for stack in stacks]
        differ = _differ(sums, group).long()
        self._differed = differ if self._differed is None else self._differed + differ

    def read(self) -> int:
        """At how many checks since the last time gradients differed; waits for the device."""
        count, self._differed = self._differed, None
        return 0 if count is None else int(count)

    @staticmethod
    def held(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> bool:
        """Whether what all of them hold differs; waits for the device."""
        return bool(_differ([_bits(x) for x in tensors], group))


def _of_present(stack: Stack, present: Sequence[bool]) -> Tensor:
    rows = stack.rows(present)
    return stack.g if len(rows) == len(stack) else stack.g[rows]


def _bits(x: Tensor) -> Tensor:
    """A sum of the entries' bits as integers: exact, in whatever order it is taken.

    Entries have the weights of their columns in rows of COLUMNS, so that two which are off by a bit
    up and a bit down, or have changed places, do not cancel.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = x.detach().contiguous().view(kinds[x.element_size()]).flatten()
    whole = len(flat) // COLUMNS * COLUMNS
    sums = flat[:whole].view(-1, COLUMNS).sum(0, dtype=torch.int64)
    sums[: len(flat) - whole] += flat[whole:]
    return sums.mul_(_weights(x.device)).sum()


@functools.cache
def _weights(device: torch.device) -> Tensor:
    """Int64 [COLUMNS], the same in every process; products and sums wrap around."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (COLUMNS,), generator=generator, device="cpu").to(device)


def _differ(sums: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """Whether the sums are other ones on another rank: bool []."""
    mine = torch.stack([x.to(sums[0].device) for x in sums])
    found = mine.new_empty(dist.get_world_size(group) * len(mine))
    _all_gather(found, mine, group)
    return (found.view(-1, len(mine)) != mine).any()
