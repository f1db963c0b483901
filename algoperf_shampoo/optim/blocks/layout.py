"""Blocks of one shape, stacked: the layout that lets every matrix routine run batched.

A :class:`Stack` holds all blocks of one shape of one parameter group. Its tensors have the block
index in front, [B, d_1, ..., d_k], and are float32 (float64 for float64 parameters) whatever the
dtype of the parameters.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..gpu.transfer import Transfer
from ..journal import Once, directly
from . import memory
from .memory import GRADIENT, BorrowedMemory
from .parameters import check_parameters
from .partition import Block, runs

_grad = operator.attrgetter("grad")


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
        vectors: named tensors [B, d_i] of the rule, one per mode.
        initial: what all entries of the named vectors are at first.
        g: [B, *shape], gradients and then update directions of the current step.
        work: like g, for what is computed from it; as many as the rule asks for.
        ready: per row, whether any of its operators was computed; until then they are the identity.
        owner: the rank that keeps these blocks; a stack of another rank's has, of all tensors, g
            alone, and meta tensors for the others (:mod:`..sharding`).
        bad: per row [B] int32 on a GPU, not zero where the gradient of its parameter is not to be
            learnt from (:mod:`.nonfinite`); None where the host has seen to that, or nobody asks.
    """

    shape: tuple[int, ...]
    members: list[Member]
    dtype: torch.dtype
    device: torch.device
    steps: list[int] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)
    vectors: dict[str, list[Tensor]] = field(default_factory=dict)
    initial: Mapping[str, float] = field(default_factory=dict)
    factors: list[Tensor] = field(default_factory=list)
    operators: list[Tensor] = field(default_factory=list)
    ready: list[bool] = field(default_factory=list)
    g: Tensor = field(default_factory=lambda: torch.empty(0))
    work: list[Tensor] = field(default_factory=list)
    bad: Tensor | None = None
    owner: int = 0
    _ready_rows: tuple[list[bool], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.steps:
            self.steps = [0] * len(self.members)
        if not self.ready:
            self.ready = [False] * len(self.members)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def numel(self) -> int:
        """Entries of a tensor [B, *shape]."""
        return len(self) * math.prod(self.shape)

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same step count."""
        return self.steps.count(self.steps[0]) == len(self.steps)

    def rows(self, present: Sequence[bool]) -> list[int]:
        """Rows whose parameter has a gradient."""
        return [r for r, member in enumerate(self.members) if present[member.param]]

    def count(self, rows: Sequence[int]) -> None:
        """One step more for these rows."""
        if len(rows) == len(self.steps):
            self.steps = [t + 1 for t in self.steps]
        else:
            for r in rows:
                self.steps[r] += 1

    def due(self, rows: list[int], frequency: int) -> list[int]:
        """Those of the rows whose step count is a multiple of ``frequency``."""
        if self.uniform:
            return [] if self.steps[0] % frequency else rows
        return [r for r in rows if self.steps[r] % frequency == 0]

    @property
    def based(self) -> bool:
        """Whether any row is ready."""
        return any(self.ready)

    def per_row(self, values: Tensor) -> Tensor:
        """[B] -> [B, 1, ..., 1]."""
        return values.view(-1, *[1] * len(self.shape))

    def kept(self) -> Tensor:
        """Rows that ``bad`` marks, bool [B, 1, ..., 1]."""
        assert self.bad is not None
        return self.per_row(self.bad != 0)

    def bias_correction(self, beta: float) -> float | Tensor:
        """1 - beta^t: a number while all rows have the same t, else a tensor [B, 1, ..., 1]."""
        if self.uniform:
            return 1 - beta ** self.steps[0]
        values = torch.tensor([1 - beta**t for t in self.steps], dtype=torch.float64)
        shape = [len(self)] + [1] * len(self.shape)
        return values.to(self.dtype).to(self.device, non_blocking=True).reshape(shape)

    def ready_rows(self) -> Tensor:
        """Indices of the rows that are ready; made on the device when they change, not before, so
        that a step that is recorded as a graph finds it made."""
        if self._ready_rows is None or self._ready_rows[0] != self.ready:
            rows = [r for r, ready in enumerate(self.ready) if ready]
            self._ready_rows = list(self.ready), torch.tensor(rows, device=self.device)
        return self._ready_rows[1]

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
            vectors={
                name: [x.index_select(0, index) for x in mine]
                for name, mine in self.vectors.items()
            },
            factors=[x.index_select(0, index) for x in self.factors],
            operators=[x.index_select(0, index) for x in self.operators],
            ready=[self.ready[r] for r in rows],
            g=self.g.index_select(0, index),
            bad=None if self.bad is None else self.bad.index_select(0, index),
        )

    def put(self, rows: Sequence[int], part: Stack) -> None:
        """Write rows made by :meth:`select` back (all but operators, which are never changed
        through a selection)."""
        index = torch.tensor(rows, device=self.device)
        self.g.index_copy_(0, index, part.g)
        for name, x in part.state.items():
            self.state[name].index_copy_(0, index, x)
        for name, mine in part.vectors.items():
            for whole, x in zip(self.vectors[name], mine, strict=True):
                whole.index_copy_(0, index, x)
        for whole, x in zip(self.factors, part.factors, strict=True):
            whole.index_copy_(0, index, x)


class BlockViews:
    """The blocks of one parameter as views of a tensor in its merged shape."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.merged = blocks[0].merged
        self._steps = [
            [
                (dim, start, length)
                for dim, (start, length) in enumerate(zip(b.start, b.shape, strict=True))
                if length != self.merged[dim]
            ]
            for b in blocks
        ]

    def of(self, merged: Tensor) -> list[Tensor]:
        """Views of the blocks, in their order."""
        views = []
        for steps in self._steps:
            view = merged
            for dim, start, length in steps:
                view = view.narrow(dim, start, length)
            views.append(view)
        return views


class Pairs(NamedTuple):
    """Parameters, or blocks of them as views, and the rows of the buffer that are theirs.

    Attributes:
        rows, pieces: contiguous, and of one dtype each.
        odd: (row, piece) that are not.
        without_view: numbers of parameters in several blocks that have no view in the merged shape.
    """

    rows: list[Tensor]
    pieces: list[Tensor]
    odd: list[tuple[Tensor, Tensor]]
    without_view: list[int]


class Layout:
    """How the parameters of one group lie in stacks, and the copies between the two.

    Gradients are gathered into one buffer, block by block in stack order; the rules replace them
    there by update directions, which are scattered from it.

    Where ranks share the work (:mod:`..sharding`), each has the gradients of all blocks, and state
    of its own ones. The buffer is in equal parts then, one of each rank's blocks.

    Attributes:
        stacks: of this rank's blocks; others: of the other ranks', by rank; everywhere: both.
        every_row: id(stack) -> all of its rows.

    Args:
        first: number of the first parameter, for messages.
        owners: the rank of every block (in the order of parameters), of ``ranks``; None: of one.
        rank: this process's.

    Raises:
        ValueError: a parameter that is empty, sparse or not of real floating-point numbers, or
            there twice.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        blocks: Callable[[Tensor], list[Block]],
        first: int = 0,
        owners: Callable[[Sequence[Member]], Sequence[int]] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.params = list(params)
        self._first = first
        check_parameters(self.params, first)
        self.blocks = [blocks(p) for p in self.params]
        members = [
            Member(i, j, block)
            for i, blocks in enumerate(self.blocks)
            for j, block in enumerate(blocks)
        ]
        owned = [0] * len(members) if owners is None else owners(members)
        by_shape: dict[tuple[int, tuple[int, ...], torch.dtype, torch.device], list[Member]] = {}
        for owner, member in zip(owned, members, strict=True):
            p = self.params[member.param]
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            key = owner, member.block.shape, dtype, p.device
            by_shape.setdefault(key, []).append(member)
        stacks = [
            Stack(shape, mine, dtype, device, owner=owner)
            for (owner, shape, dtype, device), mine in by_shape.items()
        ]
        self.rank, self.ranks = rank, ranks
        self.stacks = [s for s in stacks if s.owner == rank]
        self.others = sorted((s for s in stacks if s.owner != rank), key=lambda s: s.owner)
        self.everywhere = [*self.stacks, *self.others]
        self.every_row = {id(s): list(range(len(s))) for s in self.everywhere}
        # Per parameter, t: as it stands in ``optimizer.state``, of its first block's row.
        self.step_counts = torch.zeros(len(self.params), dtype=torch.int64)
        self._first_rows = {
            member.param: (stack, row)
            for stack in self.everywhere
            for row, member in enumerate(stack.members)
            if member.index == 0
        }
        self._views = [BlockViews(blocks) for blocks in self.blocks]
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self.borrowed: list[BorrowedMemory] = []
        # (the buffer of all ranks, this rank's part of it), one pair per dtype and device.
        self.shared: list[tuple[Tensor, Tensor]] = []
        self._pieces: list[list[Tensor]] = []  # per parameter and block, its rows of the buffer
        # Of all parameters, while they are at these addresses.
        self._all_pairs: tuple[tuple[int, ...], Pairs] = ((), Pairs([], [], [], []))
        self._transfer: Transfer | None = None
        # As `Stack.bad`, but per parameter: of those on a GPU.
        self.bad: dict[torch.device, Tensor] = {}
        # Where a gather by our kernel leaves the largest entry of every row of the gradients, as
        # they come in ``everywhere``.
        self.row_absmax: Tensor | None = None
        self._absmax_is_zeros = False
        self.measured = False

    def gather(self) -> list[bool]:
        """Copy the gradients into ``stack.g`` of all stacks; which parameters have one.

        ``measured`` says afterwards whether their largest entries stand in ``row_absmax``.

        Raises:
            ValueError: a gradient is sparse.
        """
        if not self._pieces:
            self._prepare()
        gradients = list(map(_grad, self.params))
        present = [g is not None for g in gradients]
        self.measured = False
        zeros, self._absmax_is_zeros = self._absmax_is_zeros, False
        if self._transfer is not None and self._transfer.gather(gradients, self.row_absmax, zeros):
            self.measured = self.row_absmax is not None
            return present
        to, source = [], []
        for i, (g, rows, cuts) in enumerate(zip(gradients, self._pieces, self._views, strict=True)):
            if g is None:
                continue
            if g.layout is not torch.strided:
                number = self._first + i
                raise ValueError(
                    f"the gradient of parameter {number} is sparse; only dense ones work"
                )
            if len(rows) == 1:
                to.append(rows[0])
                source.append(g)
                continue
            merged = g.reshape(cuts.merged)
            for row, piece in zip(rows, cuts.of(merged), strict=True):
                # One strided pair would send the whole foreach call down its slow path.
                if piece.is_contiguous():
                    to.append(row)
                    source.append(piece)
                else:
                    row.copy_(piece)
        if to:
            torch._foreach_copy_(to, source)
        if self.row_absmax is not None and self.others:  # the others' rows are nobody else's affair
            top = torch.cat([s.g.flatten(1).abs().amax(1) for s in self.others])
            self.row_absmax[-len(top) :].copy_(top.view(torch.int32))
        return present

    def finish(self) -> None:
        """The step is complete. The next gather needs zeros in ``row_absmax``: better now, while
        the device is at work, than when it waits for that gather."""
        if self.row_absmax is not None:
            self.row_absmax.zero_()
            self._absmax_is_zeros = True

    def apply(
        self,
        present: Sequence[bool],
        lr: float | Tensor,
        weight_decay: float,
        once: Once = directly,
    ) -> None:
        """W <- W - lr * (U + weight_decay * W), U its rows of the buffer, for those present but not
        ``bad``.

        In this order: ``W * (1 - lr * weight_decay)`` is the same in exact numbers, but in float32
        1 - 3e-7 is off by a tenth of that 3e-7, 1 - 2e-8 is 1, and W is rounded twice.

        Args:
            lr: a number, or a tensor [] on the device if all are present.
            once: see :mod:`.journal`.
        """
        transfer = self._transfer
        if (
            isinstance(lr, Tensor)
            and transfer is not None
            and once(transfer.scatter, self.params, lr, weight_decay, *self.bad.values())
        ):
            return
        pairs = self._pairs(present)
        if weight_decay != 0:
            self._add_weights(pairs, weight_decay)
        for stack in self.everywhere:
            if stack.bad is not None:
                stack.g.masked_fill_(stack.kept(), 0.0)
        if isinstance(lr, Tensor):
            for flat in self.flat(GRADIENT):
                flat.mul_(lr)
        self._scatter(pairs, -1.0 if isinstance(lr, Tensor) else -lr, once)

    def _pairs(self, present: Sequence[bool]) -> Pairs:
        """Of the parameters present; made once for all of them, and again when they move."""
        if not all(present):
            return self._make_pairs([i for i, here in enumerate(present) if here])
        addresses = tuple(map(Tensor.data_ptr, self.params))
        if addresses != self._all_pairs[0]:
            self._all_pairs = addresses, self._make_pairs(range(len(self.params)))
        return self._all_pairs[1]

    def _make_pairs(self, numbers: Iterable[int]) -> Pairs:
        pairs = Pairs([], [], [], [])
        for i in numbers:
            p, rows, cuts = self.params[i], self._pieces[i], self._views[i]
            if len(rows) > 1 and not p.is_contiguous():
                pairs.without_view.append(i)
                continue
            pieces = [p] if len(rows) == 1 else cuts.of(p.view(cuts.merged))
            for row, piece in zip(rows, pieces, strict=True):
                # One odd pair would send a whole foreach call down its slow path.
                if piece.is_contiguous() and piece.dtype == row.dtype:
                    pairs.rows.append(row)
                    pairs.pieces.append(piece)
                else:
                    pairs.odd.append((row, piece))
        return pairs

    def _add_weights(self, pairs: Pairs, alpha: float) -> None:
        """rows of the buffer <- those + alpha * their parameters."""
        if pairs.rows:
            torch._foreach_add_(pairs.rows, pairs.pieces, alpha=alpha)
        for row, piece in pairs.odd:
            row.add_(piece, alpha=alpha)
        for i in pairs.without_view:
            cuts = self._views[i]
            pieces = cuts.of(self.params[i].reshape(cuts.merged))
            for row, piece in zip(self._pieces[i], pieces, strict=True):
                row.add_(piece, alpha=alpha)

    def _scatter(self, pairs: Pairs, alpha: float, once: Once) -> None:
        """parameters <- those + alpha * their rows of the buffer."""
        for row, piece in pairs.odd:  # converted, some of them, so that they take memory one by one
            once(piece.add_, row, alpha=alpha)
        for i in pairs.without_view:
            p, rows, cuts = self.params[i], self._pieces[i], self._views[i]
            whole = torch.empty(cuts.merged, dtype=rows[0].dtype, device=p.device)
            for row, piece in zip(rows, cuts.of(whole), strict=True):
                piece.copy_(row)
            once(p.add_, whole.view(p.shape), alpha=alpha)
        if pairs.rows:
            once(torch._foreach_add_, pairs.pieces, pairs.rows, alpha=alpha)

    def common_step(self) -> int | None:
        """t of all blocks, where it is the same."""
        t = self.everywhere[0].steps[0] if self.everywhere else 0
        return t if all(s.steps.count(t) == len(s.steps) for s in self.everywhere) else None

    def publish_steps(self) -> None:
        """Bring ``step_counts`` up to date."""
        if (t := self.common_step()) is not None:
            self.step_counts.fill_(t)
        else:
            rows = [self._first_rows[i] for i in range(len(self.params))]
            self.step_counts.copy_(torch.tensor([stack.steps[row] for stack, row in rows]))

    def flat(self, name: str) -> list[Tensor]:
        """The memory of a state tensor of all stacks: one flat tensor per dtype and device."""
        return [buffer for (key, _, _), buffer in self._buffers.items() if key == name]

    def allocate(
        self,
        names: Callable[[Stack], Sequence[str]],
        work: Callable[[Stack], int],
        vectors: Callable[[Stack], Mapping[str, float]] = lambda stack: {},
    ) -> None:
        """Zeros [B, *shape] as ``stack.state[name]`` for the names of every stack, as ``g`` and as
        so many ``work`` buffers of every stack; and ``stack.vectors``, [B, d_i] filled with the
        numbers given."""
        kinds = sorted({(s.dtype, s.device) for s in self.everywhere}, key=str)
        for dtype, device in kinds:  # the same order on all ranks
            kind = [s for s in self.everywhere if (s.dtype, s.device) == (dtype, device)]
            arena = memory.Arena(kind, names, work, self.rank, self.ranks)
            self.borrowed.append(arena.borrowed)
            self.shared.append((arena.flat[GRADIENT], arena.own_gradients))
            for name, flat in arena.flat.items():
                self._buffers[name, dtype, device] = flat
        for stack in self.everywhere:
            device = stack.device if stack.owner == self.rank else torch.device("meta")
            stack.initial = vectors(stack)
            for name, initial in stack.initial.items():
                stack.vectors[name] = [
                    torch.full((len(stack), d), initial, dtype=stack.dtype, device=device)
                    for d in stack.shape
                ]

    def _prepare(self) -> None:
        """The views of the gradient buffer that are ever needed."""
        pieces = [[torch.empty(0)] * len(blocks) for blocks in self.blocks]
        for stack in self.everywhere:
            for row, member in enumerate(stack.members):
                whole = len(self.blocks[member.param]) == 1
                shape = self.params[member.param].shape if whole else stack.shape
                pieces[member.param][member.index] = stack.g[row].view(shape)
        if Transfer.fits(self.params):
            (buffer,) = self.flat(GRADIENT)
            blocks = [
                (m.param, runs(m.block), int(stack.g[row].storage_offset()))
                for stack in self.everywhere
                for row, m in enumerate(stack.members)
            ]
            self._transfer = Transfer(blocks, buffer)
        self._pieces = pieces  # only now, so that a failure leaves nothing half made
