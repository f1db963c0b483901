"""Blocks of one shape, stacked: the layout that lets every matrix routine run batched.

A :class:`Stack` holds all blocks of one shape of one parameter group. Its tensors have the block
index in front, [B, d_1, ..., d_k], and are float32 (float64 for float64 parameters) whatever the
dtype of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .blocking import Block


@dataclass(frozen=True)
class Member:
    """Row of a stack: block number ``index`` of parameter ``param`` (position in its group)."""

    param: int
    index: int
    block: Block


@dataclass
class Stack:
    """State of all blocks of one shape.

    Attributes:
        shape: (d_1, ..., d_k) of one block.
        members: which block each row is.
        steps: per row, how often it was updated (t in the paper); parameters may lack gradients.
        state: named tensors [B, ...] of the rule (moments, D, ...).
        factors: per mode, [B, d_i, d_i]; empty where the rule keeps none.
        operators: per mode, [B, d_i, d_i]: eigenbases Q, or inverse roots.
        ready: per row, whether any of its operators was computed; until then they are the identity.
    """

    shape: tuple[int, ...]
    members: list[Member]
    dtype: torch.dtype
    device: torch.device
    steps: list[int] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    factors: list[Tensor] = field(default_factory=list)
    operators: list[Tensor] = field(default_factory=list)
    ready: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.steps:
            self.steps = [0] * len(self.members)
        if not self.ready:
            self.ready = [False] * len(self.members)

    def __len__(self) -> int:
        return len(self.members)

    def zeros(self, *shape: int) -> Tensor:
        """A zero tensor [B, *shape] in the stack's dtype."""
        return torch.zeros(len(self), *shape, dtype=self.dtype, device=self.device)

    def bias_correction(self, beta: float) -> float | Tensor:
        """1 - beta^t: a number while all rows have the same t, else a tensor [B, 1, ..., 1]."""
        if len(set(self.steps)) == 1:
            return 1 - beta ** self.steps[0]
        values = torch.tensor([1 - beta**t for t in self.steps], dtype=torch.float64)
        shape = [len(self)] + [1] * len(self.shape)
        return values.to(self.dtype).to(self.device, non_blocking=True).reshape(shape)

    def select(self, rows: Sequence[int]) -> Stack:
        """A stack of copies of some rows; :meth:`put` writes them back."""
        index = torch.tensor(rows, device=self.device)
        return Stack(
            shape=self.shape,
            members=[self.members[r] for r in rows],
            dtype=self.dtype,
            device=self.device,
            steps=[self.steps[r] for r in rows],
            state={name: x.index_select(0, index) for name, x in self.state.items()},
            factors=[x.index_select(0, index) for x in self.factors],
            operators=[x.index_select(0, index) for x in self.operators],
            ready=[self.ready[r] for r in rows],
        )

    def put(self, rows: Sequence[int], part: Stack) -> None:
        """Write rows made by :meth:`select` back (state and factors; operators are never changed
        through a selection)."""
        index = torch.tensor(rows, device=self.device)
        for name, x in part.state.items():
            self.state[name].index_copy_(0, index, x)
        for whole, x in zip(self.factors, part.factors, strict=True):
            whole.index_copy_(0, index, x)


class Layout:
    """How the parameters of one group lie in stacks, and the copies between the two.

    Raises:
        ValueError: an empty, sparse or complex parameter.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        blocks: Callable[[Tensor], list[Block]],
    ) -> None:
        self.params = list(params)
        self.blocks = [blocks(p) for p in self.params]
        by_shape: dict[tuple[object, ...], list[Member]] = {}
        for i, p in enumerate(self.params):
            if p.is_sparse or p.is_complex():
                raise ValueError(f"parameter {i} is sparse or complex; only dense real ones work")
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            for j, block in enumerate(self.blocks[i]):
                key = (block.shape, dtype, p.device)
                by_shape.setdefault(key, []).append(Member(i, j, block))
        self.stacks = [
            Stack(shape=key[0], members=members, dtype=key[1], device=key[2])  # type: ignore[arg-type]
            for key, members in by_shape.items()
        ]

    def gather(self, stack: Stack, rows: Sequence[int]) -> Tensor:
        """Gradients of the given rows, [len(rows), *shape], in the stack's dtype."""
        out = torch.empty(len(rows), *stack.shape, dtype=stack.dtype, device=stack.device)
        fast_to, fast_from = [], []
        for slot, row in enumerate(rows):
            member = stack.members[row]
            grad = self.params[member.param].grad
            assert grad is not None
            if grad.is_sparse:
                raise ValueError(f"parameter {member.param} has a sparse gradient")
            piece = _piece(grad, member.block)
            if piece.dtype == out.dtype and piece.is_contiguous():
                fast_to.append(out[slot])
                fast_from.append(piece)
            else:
                out[slot].copy_(piece)
        if fast_to:
            torch._foreach_copy_(fast_to, fast_from)
        return out

    def scatter(self, stack: Stack, rows: Sequence[int], update: Tensor, alpha: float) -> None:
        """parameter <- parameter + alpha * update, block by block; update [len(rows), *shape]."""
        fast_to, fast_from = [], []
        for slot, row in enumerate(rows):
            member = stack.members[row]
            param = self.params[member.param].detach()
            if not param.is_contiguous():
                # A view in the merged shape does not exist: add in the parameter's own shape.
                whole = torch.zeros(member.block.merged, dtype=update.dtype, device=update.device)
                whole[member.block.slices] = update[slot]
                param.add_(whole.reshape(param.shape), alpha=alpha)
                continue
            piece = _piece(param, member.block)
            if piece.dtype == update.dtype and piece.is_contiguous():
                fast_to.append(piece)
                fast_from.append(update[slot])
            else:
                piece.add_(update[slot], alpha=alpha)
        if fast_to:
            torch._foreach_add_(fast_to, fast_from, alpha=alpha)


def _piece(x: Tensor, block: Block) -> Tensor:
    """The part of a parameter-shaped tensor that a block covers, as a view where possible."""
    return x.reshape(block.merged)[block.slices]
