"""What rules compute on stacks, on a GPU: every operation one launch, or a few, for all stacks.

A model has stacks of many shapes, some of a single small block. One after the other they leave most
of a GPU idle. Here the tiles of all stacks' products stand in one table, so that an ordinary step
of any model is about fifteen launches (of :mod:`.kernels`), and its temporary memory one
scratch buffer as large as the gradients (and with convolutions the pieces of long sums).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import noise
from ..blocks.layout import Stack
from ..blocks.rows import runs
from ..journal import Once, directly
from ..nonfinite import Guard, bound_bits
from ..ops import Hyper
from ..ops.values import Place
from . import tiles, triton_kernels
from .tiles import Tile

Calls = list[Callable[..., None]]


class GramOperand(NamedTuple):
    """Mode ``mode`` of x, whose row maxima are those of ``place``: [d, K] a row, or [K, d] with
    ``columns``; ``scales`` [B, K] of the columns k, and their row maxima."""

    stack: Stack
    place: Place
    mode: int
    x: Tensor
    columns: bool
    scales: tuple[Tensor, Tensor] | None = None


class KernelLaunches:
    """Our kernels on float32 stacks of one GPU, all rows taking part.

    Tensors come as places (:class:`~..ops.values.Place`) of the stacks' buffers. What a kernel has
    to know of them beside their entries is here, by the number of the buffer: no two have the same.

    Args:
        stacks: all stacks there will be; none where all blocks are other ranks'.
        once: see :mod:`..journal`.
        others: those of other ranks' blocks. Tiles are chosen by all of them, so that a block's
            numbers do not depend on who computes them.

    Products are accurate to float32 (relative error 3e-7 of the result's norm), those of rotations
    under ``matmul_precision`` "high" to 11 bits of their inputs, as in TF32 (3e-4).
    """

    def __init__(
        self, stacks: Sequence[Stack], once: Once = directly, others: Sequence[Stack] = ()
    ) -> None:
        self._first = (*stacks, *others)[0]
        self.once, self._device = once, self._first.device
        self._kernels: Any = triton_kernels()
        assert self._kernels is not None
        self._small = sum(s.numel for s in (*stacks, *others)) < tiles.SMALL_MODEL
        self._wide = {
            split: tiles.SMALL if self._small or not _much_shared_memory(self._device) else large
            for split, large in ((True, tiles.LARGE), (False, tiles.LARGE_ROUNDED))
        }
        count = self._own = sum(len(s) for s in stacks)
        starts = [sum(len(s) for s in stacks[:i]) for i in range(len(stacks))]
        # Row maxima of `g`, every work buffer, state that is rotated, and what nobody asks for.
        buffers = 1 + max((len(s.work) for s in stacks), default=0)
        rows = count + sum(len(s) for s in others)
        self._absmax = torch.zeros(buffers + 2, rows, dtype=torch.int32, device=self._device)
        # Limits of noise, see :mod:`..noise`, and those that nothing is below.
        self._limits, self._no_limits = torch.zeros(2, count, device=self._device).unbind()
        self._no_marks = torch.zeros(count, dtype=torch.int32, device=self._device)
        self._rows = {id(s): slice(i, i + len(s)) for s, i in zip(stacks, starts, strict=True)}
        self._ones = torch.ones(count, device=self._device)  # absmax of orthogonal operators
        self._factors = torch.ones(count, device=self._device)  # of the rows' directions
        self._operator_absmax: dict[tuple[int, int], Tensor] = {}
        self._launches: dict[Hashable, Calls] = {}

    @property
    def row_absmax_of_gradients(self) -> Tensor:
        """Absmax of ``g``'s rows, then of other ranks'; a gather may leave them there."""
        return self._absmax[0]

    def judge(self, guard: Guard, present: Sequence[bool]) -> None:
        if not self._marked:
            return
        marks = guard.marks
        with torch.cuda.device_of(marks.rows):
            self.once(
                self._kernels.judge[(len(marks.params),)],
                marks.first,
                marks.row_of,
                self.row_absmax_of_gradients,
                marks.rows,
                marks.params,
                marks.counts,
                len(marks.params),
                bound_bits(),
            )

    def _marks_of(self, stack: Stack) -> Tensor:
        return self._no_marks if stack.bad is None else stack.bad

    def gram_ema(
        self,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        spares: Sequence[Place],
        beta: float,
        weight: float,
    ) -> None:
        """In rounds: the first and the last mode of every stack and one of those between, which is
        brought to the front in the spare place, then another one of those."""
        for number in range(max(1, max(len(s.shape) for s in stacks) - 2)):
            here = [i for i, s in enumerate(stacks) if number == 0 or number + 2 < len(s.shape)]
            some = [stacks[i] for i in here]
            mine, to = ([x[i] for i in here] for x in (xs, spares))
            for stack, x, spare in zip(some, mine, to, strict=True):
                if number + 2 < len(stack.shape):
                    front = x.tensor.movedim(number + 2, 1)
                    spare.tensor.view(front.shape).copy_(front)
            build = functools.partial(self._gram_of_round, some, mine, to, number)
            for launch in self._known(("gram", number), some, [*mine, *to], build):
                self.once(launch, beta, weight)

    def limits(self, stacks: Sequence[Stack], h: Hyper) -> None:
        """What is noise in the stacks' bases, see :mod:`..noise`, for the next :meth:`adam`."""

        def build() -> Calls:
            groups = []
            for s in stacks:
                d = min(s.shape)
                factor = s.factors[s.shape.index(d)]
                mine = self._limits[self._rows[id(s)]]
                groups.append([factor.data_ptr(), mine.data_ptr(), d, math.prod(s.shape)])
            places = [[g, row, 0, 0] for g, s in enumerate(stacks) for row in range(len(s))]
            return [self._launch(self._kernels.limits, groups, places, SIZE=128, num_warps=4)]

        for launch in self._known("limits", stacks, (), build):
            launch(*noise.levels(h, torch.float32, on_gpu=True))

    def adam(
        self,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        moments: Sequence[tuple[Tensor, Tensor]],
        h: Hyper,
        limited: Sequence[bool],
        corrected: bool,
        factors: Sequence[Any] | None = None,
    ) -> None:
        """h.corrections: tensors, where they were at the first call. limited: which stacks' noise
        is left out. factors: see :meth:`..ops.base.Operations.adam`."""
        corrections = h.corrections
        assert corrections is not None

        def build() -> Calls:
            groups = []
            for s, x, mine, limit in zip(stacks, xs, moments, limited, strict=True):
                rows = self._rows[id(s)]
                c1, c2 = corrections[id(s)] if corrected else (self._ones[rows],) * 2
                tensors = x.tensor, *mine, self._absmax_of(s, x), c1, c2
                limits = (self._limits if limit else self._no_limits)[rows]
                more = self._marks_of(s), limits, self._factors_of(s, factors)
                addresses = [t.data_ptr() for t in tensors]
                groups.append([*addresses, math.prod(s.shape), *(t.data_ptr() for t in more)])
            return self._elementwise(self._kernels.adam, stacks, groups, 6)

        self._clear_absmax(stacks, xs)
        if factors is not None:
            self._set_factors(stacks, factors)
        numbers = h.beta1, 1 - h.beta1, h.beta_d, 1 - h.beta_d, h.eps
        state = tuple([t.data_ptr() for mine in moments for t in mine])
        name = "adam", state, tuple(limited), corrected, factors is None
        for launch in self._known(name, stacks, xs, build):
            ran: list[bool] = []
            self.once(_run_and_note, ran, launch, *numbers, NADAM=h.nadam)
            if not ran:  # the moments have learnt already: the direction alone
                launch(h.beta1, 0.0, 1.0, 0.0, h.eps, NADAM=h.nadam)

    def _factors_of(self, stack: Stack, factors: Sequence[Any] | None) -> Tensor:
        """Where a kernel finds the factors of the stack's rows."""
        return (self._ones if factors is None else self._factors)[self._rows[id(stack)]]

    def _set_factors(self, stacks: Sequence[Stack], factors: Sequence[Any]) -> None:
        """factors: numbers, or tensors [] or [B, 1, ..., 1] on the device."""
        mine = [self._factors[self._rows[id(s)]] for s in stacks]
        if all(factor is factors[0] for factor in factors) and len(stacks) == len(self._rows):
            mine, factors = [self._factors], factors[:1]
        to = [x for x, f in zip(mine, factors, strict=True) if isinstance(f, Tensor)]
        for x, factor in zip(mine, factors, strict=True):
            if not isinstance(factor, Tensor):
                x.fill_(factor)
        if to:
            tensors = [f.view(-1) for f in factors if isinstance(f, Tensor)]
            torch._foreach_copy_(to, [f.expand(len(x)) for x, f in zip(to, tensors, strict=True)])

    def rotate_mode_(
        self,
        stack: Stack,
        x: Tensor,
        mode: int,
        rows: Sequence[int],
        back: bool,
        g: Tensor,
        scratch: Tensor,
    ) -> None:
        absmax = torch.linalg.vector_norm(x.flatten(1), torch.inf, 1)
        self._absmax[-2, self._rows[id(stack)]].copy_(absmax.view(torch.int32))
        whole, source, target = x, x, scratch
        if between := 0 < mode < len(stack.shape) - 1:  # as the first mode, by way of `g`
            x = x.movedim(mode + 1, 1)
            source, target = scratch.view(x.shape).copy_(x), g.view(x.shape)
        build = functools.partial(self._one_rotation, stack, source, target, mode, between, rows)
        key = "one rotation", whole.data_ptr(), mode, tuple(rows)
        for launch in self._known(key, [stack], (), build, keep=len(rows) == len(stack)):
            launch(back)
        for part in runs(rows):
            x[part].copy_(target[part])

    def products(
        self,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        others: Sequence[Place],
        *,
        back: bool,
        orthogonal: bool,
        split: bool,
    ) -> list[Place]:
        """One product per mode, to and fro between ``xs`` and ``others``; where the results are.

        Each contracts the leading mode and appends it at the back, as :func:`..ops.linalg.rotate`.
        """
        sources, targets = list(xs), list(others)
        for mode in range(max(len(s.shape) for s in stacks)):
            here = [i for i, s in enumerate(stacks) if mode < len(s.shape)]
            some = [stacks[i] for i in here]
            a, b = ([x[i] for i in here] for x in (sources, targets))
            self._clear_absmax(some, b)
            build = functools.partial(self._rotations, some, a, b, mode, orthogonal, split)
            name = "rotation", mode, orthogonal, split
            for launch in self._known(name, some, [*a, *b], build):
                launch(A_ROWS=False, B_ROWS=back)
            for i in here:
                sources[i], targets[i] = targets[i], sources[i]
        return sources

    def _known(
        self,
        name: Hashable,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        build: Callable[[], Calls],
        keep: bool = True,
    ) -> Calls:
        """The launches of an operation, with their tables: made once, all addresses stay."""
        numbers = tuple([x.number for x in xs])
        key = name, tuple([id(s) for s in stacks]), numbers, self._marked
        launches = self._launches.get(key) or build()
        if keep:
            self._launches[key] = launches
        return launches

    @property
    def _marked(self) -> bool:
        """Whether rows of bad gradients are marked."""
        return self._first.bad is not None

    def _absmax_of(self, stack: Stack, x: Place) -> Tensor:
        """Absmax of the rows of x."""
        assert x.number >= 0, "not in a buffer"
        return self._absmax[x.number, self._rows[id(stack)]]

    def _clear_absmax(self, stacks: Sequence[Stack], xs: Sequence[Place]) -> None:
        """Kernels raise what is there: zeros first."""
        if len(xs) == len(self._rows):
            buffers = {x.number for x in xs}
            if len(buffers) == 1:
                self._absmax[buffers.pop(), : self._own].zero_()  # not other ranks' rows
                return
        torch._foreach_zero_([self._absmax_of(s, x) for s, x in zip(stacks, xs, strict=True)])

    def measure(self, stacks: Sequence[Stack], xs: Sequence[Place]) -> None:
        """Find the row maxima of places."""

        def build() -> Calls:
            groups = [
                [x.tensor.data_ptr(), self._absmax_of(s, x).data_ptr(), math.prod(s.shape)]
                for s, x in zip(stacks, xs, strict=True)
            ]
            return self._elementwise(self._kernels.row_absmax, stacks, groups, 2)

        self._clear_absmax(stacks, xs)
        for launch in self._known("row absmax", stacks, xs, build):
            launch()

    def measure_operators(self, stacks: Sequence[Stack]) -> None:
        """Find the row maxima of operators that are not orthogonal."""
        modes = [(s, mode) for s in stacks for mode in range(len(s.shape))]
        for s, mode in modes:
            if (id(s), mode) not in self._operator_absmax:
                zeros = torch.zeros(len(s), dtype=torch.int32, device=self._device)
                self._operator_absmax[id(s), mode] = zeros
        found = [self._operator_absmax[id(s), mode] for s, mode in modes]

        def build() -> Calls:
            groups = [
                [s.operators[mode].data_ptr(), absmax.data_ptr(), s.shape[mode] ** 2]
                for (s, mode), absmax in zip(modes, found, strict=True)
            ]
            rows = [s for s, _ in modes]
            return self._elementwise(self._kernels.row_absmax, rows, groups, 2)

        torch._foreach_zero_(found)
        for launch in self._known("operators", stacks, (), build):
            launch()

    def _elementwise(
        self,
        kernel: Any,
        stacks: Sequence[Stack],
        groups: list[list[int]],
        size_at: int,
        **settings: Any,
    ) -> Calls:
        """A pass over all rows of all stacks; word ``size_at`` of a group is a row's entries."""
        sizes = [(range(len(s)), group[size_at]) for s, group in zip(stacks, groups, strict=True)]
        settings |= dict(SIZE=tiles.ENTRIES, num_warps=4)
        return [
            self._launch(kernel, groups, mine, ALIGN=align, **settings)
            for align, mine in tiles.elementwise(sizes).items()
        ]

    def _one_rotation(
        self,
        stack: Stack,
        source: Tensor,
        target: Tensor,
        mode: int,
        between: bool,
        rows: Sequence[int],
    ) -> Calls:
        """One mode of source into target, the first one if it is ``between`` others; each to be
        called with whether it is back."""
        d, rest = stack.shape[mode], math.prod(stack.shape) // stack.shape[mode]
        absmax, unused = self._absmax[-2:, self._rows[id(stack)]]
        tensors = [(source, absmax), (stack.operators[mode], self._ones)]
        # In the first mode Q'x or Q x; in the last one, and for vectors, x Q or x Q'.
        first = between or (mode == 0 and rest > 1)
        (a, absmax_a), (b, absmax_b) = reversed(tensors) if first else tensors
        M, N = (d, rest) if first else (rest, d)
        addresses = [t.data_ptr() for t in (a, b, target, absmax_a, absmax_b, unused)]
        launches = self._multiply([[*addresses, M, N, d]], [(rows, M, N, d)], True)
        if first:
            return [lambda back, r=run: r(A_ROWS=back, B_ROWS=False) for run in launches]
        return [lambda back, r=run: r(A_ROWS=True, B_ROWS=back) for run in launches]

    def _rotations(
        self,
        stacks: Sequence[Stack],
        sources: Sequence[Place],
        targets: Sequence[Place],
        mode: int,
        orthogonal: bool,
        split: bool,
    ) -> Calls:
        groups, sizes = [], []
        for stack, x, y in zip(stacks, sources, targets, strict=True):
            d, M = stack.shape[mode], math.prod(stack.shape) // stack.shape[mode]
            absmax_q = self._ones if orthogonal else self._operator_absmax[id(stack), mode]
            absmax = self._absmax_of(stack, x), absmax_q, self._absmax_of(stack, y)
            tensors = x.tensor, stack.operators[mode], y.tensor, *absmax
            groups.append([*(t.data_ptr() for t in tensors), M, d, d])
            sizes.append((range(len(stack)), M, d, d))
        return self._multiply(groups, sizes, split)

    def _multiply(
        self,
        groups: Sequence[Sequence[int]],
        sizes: Sequence[tuple[Sequence[int], int, int, int]],
        split: bool,
        between: bool = False,
    ) -> Calls:
        """Products, each to be called with the layouts A_ROWS and B_ROWS. between: of modes with
        others before and after."""
        wide = tiles.SMALL if between else self._wide[split]  # a large one spills on an A100
        launches: Calls = []
        for kind, mine in tiles.products(sizes, wide).items():
            if kind.shape == "vector":
                settings = dict(tiles.VECTOR, ALIGN_K=kind.align_k)
                run = self._launch(self._kernels.matvec, groups, mine, **settings)
                launches.append(lambda A_ROWS, B_ROWS, r=run: r(B_ROWS=B_ROWS))
                continue
            settings = dict(
                tiles.shapes(wide)[kind.shape],
                BETWEEN=between,
                SPLIT=split,
                ALIGN_M=kind.align_m,
                ALIGN_N=kind.align_n,
                ALIGN_K=kind.align_k,
            )
            launches.append(self._launch(self._kernels.product, groups, mine, **settings))
        return launches

    def _gram_of_round(
        self, stacks: Sequence[Stack], xs: Sequence[Place], spares: Sequence[Place], number: int
    ) -> Calls:
        operands: list[GramOperand] = []
        for stack, place, spare in zip(stacks, xs, spares, strict=True):
            last = len(stack.shape) - 1
            if number == 0:
                operands.append(GramOperand(stack, place, 0, place.tensor, False))
            if number == 0 < last:
                operands.append(GramOperand(stack, place, last, place.tensor, True))
            if number + 1 < last:
                operands.append(GramOperand(stack, place, number + 1, spare.tensor, False))
        return self._grams(operands)

    def _grams(self, operands: Sequence[GramOperand], mean: bool = False) -> Calls:
        """Each to be called with (beta, weight). All operands are scaled, but vectors, or none."""
        groups: list[list[int]] = []
        sizes: list[tuple[int, int, int, bool]] = []
        scaled = any(o.scales is not None for o in operands)
        for stack, place, mode, x, columns, scales in operands:
            d, K = stack.shape[mode], math.prod(stack.shape) // stack.shape[mode]
            tensors = x, stack.factors[mode], self._absmax_of(stack, place)
            more = self._marks_of(stack), *(scales or ())
            addresses = [t.data_ptr() for t in tensors], [t.data_ptr() for t in more]
            groups.append([*addresses[0], d, K, *addresses[1]])
            sizes.append((len(stack), d, K, columns))
        launches: Calls = []
        kinds = tiles.grams(sizes, self._small)
        pieces = [
            (tiles.NARROW_GRAM if kind.narrow else tiles.GRAM)["S"] ** 2 * len(mine)
            for kind, mine in kinds.items()
            if kind.in_pieces
        ]
        partial = torch.empty(max(pieces, default=1), device=self._device)
        for kind, mine in kinds.items():
            if kind.outer:
                settings = dict(tiles.OUTER, ALIGN_D=kind.align_d)
                launches.append(self._launch(self._kernels.outer, groups, mine, **settings))
                continue
            settings = dict(
                tiles.NARROW_GRAM if kind.narrow else tiles.GRAM,
                COLUMNS=kind.columns,
                IN_PIECES=kind.in_pieces,
                MEAN=mean,
                SCALED=scaled,
                ALIGN_D=kind.align_d,
                ALIGN_K=kind.align_k,
            )
            run = self._launch(self._kernels.gram, groups, mine, **settings)
            launches.append(functools.partial(run, partial))
            if kind.in_pieces:
                sums, S = tiles.sums(mine), settings["S"]
                run = self._launch(self._kernels.gram_of_pieces, groups, sums, S=S)
                launches.append(functools.partial(run, partial))
        return launches

    def _launch(
        self,
        kernel: Any,
        groups: Sequence[Sequence[int]],
        places: Sequence[Tile],
        **settings: Any,
    ) -> Callable[..., None]:
        """The kernel on tables of these groups and tiles, one program a tile."""
        words = self._kernels.WORDS.value
        padded = [[*group, *[0] * (words - len(group))] for group in groups]
        table = torch.tensor(padded, dtype=torch.int64, device=self._device)
        where = torch.tensor(places, dtype=torch.int32, device=self._device)

        def run(*arguments: Any, **more: Any) -> None:
            with torch.cuda.device_of(table):
                kernel[(len(where),)](table, where, *arguments, **settings, **more)

        return run


def _much_shared_memory(device: torch.device) -> bool:
    """Whether large tiles fit a multiprocessor, as in data centres."""
    found = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return getattr(found, "shared_memory_per_block_optin", 0) >= 2**17


def _run_and_note(
    ran: list[bool], launch: Callable[..., None], *numbers: float, **settings: bool
) -> None:
    launch(*numbers, **settings)
    ran.append(True)
