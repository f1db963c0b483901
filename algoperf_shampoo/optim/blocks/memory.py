"""The memory of stacks: one piece per dtype and device, which a refresh can borrow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .layout import Stack

GRADIENT, WORK = "gradient", "work"
ALIGNMENT = 64  # entries; what cuBLAS's and our kernels load at a time starts at a multiple


@dataclass(frozen=True)
class BorrowedMemory:
    """Flat memory that a refresh may work in.

    The first ``free`` entries may be overwritten; the others' contents must be there afterwards.
    """

    memory: Tensor
    free: int


class Arena:
    """Zeros for ``g``, work buffers and named state of stacks of one dtype and device: one piece.

    What holds nothing between steps comes first, so that a refresh which borrows the piece has only
    the rest to put aside. ``g`` of all stacks comes before all else, in one part for each of the
    ranks, all as long as the longest, so that they can be gathered as they lie. A stack of another
    rank has its state on torch's meta device: shapes without memory.

    Attributes:
        flat: the memory of a name, of all stacks; own_gradients: this rank's part of ``g``'s.
        borrowed: what a refresh may work in.

    Args:
        kind: the stacks; names: of the state of each; work: how many buffers like g each has.
    """

    def __init__(
        self,
        kind: Sequence[Stack],
        names: Callable[[Stack], Sequence[str]],
        work: Callable[[Stack], int],
        rank: int,
        ranks: int,
    ) -> None:
        dtype, device = kind[0].dtype, kind[0].device
        if device.type == "cpu":
            # What a basis turns is where it was after an even number of products, else elsewhere:
            # alike next to each other, so that Adam's arithmetic passes over few pieces.
            kind = sorted(kind, key=lambda s: len(s.shape) % 2)
        mine = [s for s in kind if s.owner == rank]
        sizes = {id(s): -(-math.prod((len(s), *s.shape)) // ALIGNMENT) * ALIGNMENT for s in kind}
        by_rank = [[s for s in kind if s.owner == r] for r in range(ranks)]
        longest = max(sum(sizes[id(s)] for s in some) for some in by_rank)
        # (name, number): which stacks have it.
        most = max(map(work, mine), default=0)
        users: dict[tuple[str, int], list[Stack]] = {
            (WORK, number): [s for s in mine if number < work(s)] for number in range(most)
        }
        for name in dict.fromkeys(name for stack in mine for name in names(stack)):
            users[name, 0] = [s for s in mine if name in names(s)]
        totals = [sum(sizes[id(s)] for s in some) for some in users.values()]
        gradients = ranks * longest
        memory = torch.zeros(gradients + sum(totals), dtype=dtype, device=device)
        self.borrowed = BorrowedMemory(memory, gradients + sum(totals[:most]))
        self.flat = {GRADIENT: memory[:gradients]}
        parts = self.flat[GRADIENT].split(longest)
        self.own_gradients = parts[rank]
        for some, part in zip(by_rank, parts, strict=True):
            for stack, view in zip(some, _views(some, part, sizes), strict=True):
                stack.g = view
        pieces = memory[gradients:].split(totals) if totals else ()
        for ((name, number), some), flat in zip(users.items(), pieces, strict=True):
            if number == 0:
                self.flat[name] = flat
            for stack, view in zip(some, _views(some, flat, sizes), strict=True):
                if name == WORK:
                    stack.work.append(view)
                else:
                    stack.state[name] = view
        for stack in kind:
            if stack.owner != rank:
                for name in names(stack):
                    stack.state[name] = stack.g.new_empty(stack.g.shape, device="meta")


def joined(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """The same entries in fewer tensors: where tensors follow one another in memory, in all lists
    alike, one flat view of each list from the first to the last, what :data:`ALIGNMENT` leaves
    between them included.

    Args:
        lists: of contiguous tensors; those in one place have one size.
    """
    order = sorted(range(len(lists[0])), key=lambda i: lists[0][i].data_ptr())
    runs: list[list[int]] = []
    for i in order:
        if runs and all(_follows(x[runs[-1][-1]], x[i]) for x in lists):
            runs[-1].append(i)
        else:
            runs.append([i])
    return [[_whole(x[run[0]], x[run[-1]]) for run in runs] for x in lists]


def _follows(x: Tensor, y: Tensor) -> bool:
    """Whether y is the next to come after x in one memory."""
    size = -(-x.numel() // ALIGNMENT) * ALIGNMENT
    same = x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() and x.dtype == y.dtype
    return same and y.storage_offset() == x.storage_offset() + size


def _whole(first: Tensor, last: Tensor) -> Tensor:
    """From the first entry of one to the last entry of the other, flat."""
    start = first.storage_offset()
    return first.as_strided((last.storage_offset() + last.numel() - start,), (1,), start)


def _views(stacks: Sequence[Stack], flat: Tensor, sizes: dict[int, int]) -> list[Tensor]:
    """[B, *shape] of every stack, one after the other in flat memory."""
    views, start = [], 0
    for s in stacks:
        size = math.prod((len(s), *s.shape))
        views.append(flat[start : start + size].view(len(s), *s.shape))
        start += sizes[id(s)]
    return views
