"""What :mod:`.launches` has for single modes, and for vectors of modes such as KL-Shampoo's
eigenvalues: each again one launch, or a few, for all stacks."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks.layout import Stack
from ..blocks.memory import ALIGNMENT
from ..ops.values import ModeVectors, Place, resolved
from . import tiles, triton_mode_kernels
from .launches import Calls, GramOperand, KernelLaunches

GIVEN = "given"  # by a caller, anew at each call
ROOTS = "roots"  # what inverse_sqrt has left


class Scales:
    """Vectors of all modes of all stacks, and what follows from them, always at one address.

    Attributes:
        vectors: [B, d_i] of each stack and mode; row_absmax: their row maxima, int32 [B].
        others: per stack and mode the products of the entries of all other modes' vectors, as
            many as the mode's matricization has columns, and their row maxima: views of the above
            for matrices, ones for vectors.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        device = stacks[0].device
        # All start at multiples of what is loaded at a time.
        sizes = [-(-len(s) * d // ALIGNMENT) * ALIGNMENT for s in stacks for d in s.shape]
        pieces = iter(torch.ones(sum(sizes), device=device).split(sizes))
        self.vectors = {
            id(s): [next(pieces)[: len(s) * d].view(len(s), d) for d in s.shape] for s in stacks
        }
        counts = [len(s) for s in stacks for _ in s.shape]
        counts += [len(s) for s in stacks if len(s.shape) != 2 for _ in s.shape]
        self.all_row_absmax = torch.zeros(sum(counts), dtype=torch.int32, device=device)
        row_absmax = iter(self.all_row_absmax.split(counts))
        self.row_absmax = {id(s): [next(row_absmax) for _ in s.shape] for s in stacks}
        self.others: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for s in stacks:
            mine, maxima = self.vectors[id(s)], self.row_absmax[id(s)]
            if len(s.shape) == 2:
                self.others[id(s)] = [(mine[1], maxima[1]), (mine[0], maxima[0])]
            else:
                self.others[id(s)] = [
                    (torch.ones(len(s), math.prod(s.shape) // d, device=device), next(row_absmax))
                    for d in s.shape
                ]


class ModeLaunches(KernelLaunches):
    """:class:`.launches.KernelLaunches`, and what has to do with single modes."""

    def __init__(self, stacks: Sequence[Stack], *arguments: Any) -> None:
        super().__init__(stacks, *arguments)
        module = triton_mode_kernels()
        assert module is not None
        self._mode_kernels = module
        self._stacks = list(stacks)
        self._scales: dict[str, Scales] = {}

    # Vectors of modes.

    def inverse_sqrt(self, vectors: ModeVectors, limit: Callable[[int], float]) -> ModeVectors:
        """See :meth:`..ops.modes.ModeOperations.inverse_sqrt`."""
        scales, stacks = self._known_scales(ROOTS), vectors.stacks

        def build() -> Calls:
            modes = _modes(stacks)
            groups = [
                [
                    vectors.vectors[number][mode].data_ptr(),
                    scales.vectors[id(s)][mode].data_ptr(),
                    scales.row_absmax[id(s)][mode].data_ptr(),
                    s.shape[mode],
                    _bits(limit(s.shape[mode])),
                ]
                for number, s, mode in modes
            ]
            rows = [s for _, s, _ in modes]
            kernel = self._mode_kernels.inverse_sqrts
            calls = self._elementwise(kernel, rows, groups, 3)
            return calls + self._products_of_others(scales, stacks)

        def run() -> None:
            scales.all_row_absmax.zero_()
            key = tuple([v.data_ptr() for mine in vectors.vectors for v in mine])
            for launch in self._known(("inverse sqrt", key), stacks, (), build):
                launch()

        self.once(run)
        return ModeVectors(stacks, [scales.vectors[id(s)] for s in stacks])

    def _given(self, stacks: Sequence[Stack], vectors: ModeVectors) -> str:
        """Which scales these vectors are: those of :meth:`inverse_sqrt` as they are, others copied
        and measured."""
        mine = vectors.of(stacks)
        if not stacks or mine[0][0] is self._known_scales(ROOTS).vectors[id(stacks[0])][0]:
            return ROOTS
        scales = self._known_scales(GIVEN)
        pairs = [
            (to, x)
            for s, xs in zip(stacks, mine, strict=True)
            for to, x in zip(scales.vectors[id(s)], xs, strict=True)
        ]
        torch._foreach_copy_([to for to, _ in pairs], [x for _, x in pairs])

        def build() -> Calls:
            modes = _modes(stacks)
            groups = [
                [
                    scales.vectors[id(s)][mode].data_ptr(),
                    scales.row_absmax[id(s)][mode].data_ptr(),
                    s.shape[mode],
                ]
                for _, s, mode in modes
            ]
            calls = self._elementwise(self._kernels.row_absmax, [s for _, s, _ in modes], groups, 2)
            return calls + self._products_of_others(scales, stacks)

        scales.all_row_absmax.zero_()
        for launch in self._known("given scales", stacks, (), build):
            launch()
        return GIVEN

    def _known_scales(self, name: str) -> Scales:
        if name not in self._scales:
            self._scales[name] = Scales(self._stacks)
        return self._scales[name]

    def _products_of_others(self, scales: Scales, stacks: Sequence[Stack]) -> Calls:
        """For every mode of stacks of order 1 and from 3 on."""
        calls: Calls = []
        for order in sorted({len(s.shape) for s in stacks} - {2}):
            groups, rows = [], []
            for _, s, mode in _modes([s for s in stacks if len(s.shape) == order]):
                to, absmax = scales.others[id(s)][mode]
                rest = [i for i in range(order) if i != mode]
                groups.append(
                    [
                        to.data_ptr(),
                        absmax.data_ptr(),
                        to.shape[1],
                        *self._words_of_modes(s, scales, rest),
                    ]
                )
                rows.append(s)
            kernel = self._mode_kernels.scales
            calls += self._elementwise(kernel, rows, groups, 2, ORDER=order - 1)
        return calls

    @staticmethod
    def _words_of_modes(stack: Stack, scales: Scales, modes: Sequence[int]) -> list[int]:
        """Per mode: vectors, their size, entries after the mode, of a block with these modes."""
        sizes = [stack.shape[i] for i in modes]
        return [
            word
            for position, mode in enumerate(modes)
            for word in (
                scales.vectors[id(stack)][mode].data_ptr(),
                sizes[position],
                math.prod(sizes[position + 1 :]),
            )
        ]

    def mean_square_ema(
        self,
        vectors: ModeVectors,
        xs: Sequence[Place],
        beta: float,
        scale: ModeVectors,
        limit: Callable[[int], float],
    ) -> None:
        """See :meth:`..ops.modes.ModeOperations.mean_square_ema`."""
        stacks = vectors.stacks
        name = self._given(stacks, scale)

        def build() -> Calls:
            # The sums of all modes come before any vector changes.
            sums: Calls = []
            averages: Calls = []
            for where in range(3):
                mine = [
                    (number, s, mode)
                    for number, s, mode in _modes(stacks)
                    if where == (0 if mode == 0 else 1 if mode == len(s.shape) - 1 else 2)
                ]
                if mine:
                    a, b = self._squares(where, mine, vectors, xs, self._scales[name], limit)
                    sums += a
                    averages += b

            def sum_up(beta: float, rest: float) -> None:
                for run in sums:
                    run()

            def average(beta: float, rest: float) -> None:
                for run in averages:
                    run(beta, rest)

            return [sum_up, functools.partial(self.once, average)]

        key = tuple([v.data_ptr() for mine in vectors.vectors for v in mine])
        for launch in self._known(("mean square", name, key), stacks, xs, build):
            launch(beta, 1 - beta)

    def _squares(
        self,
        where: int,
        modes: Sequence[tuple[int, Stack, int]],
        vectors: ModeVectors,
        xs: Sequence[Place],
        scales: Scales,
        limit: Callable[[int], float],
    ) -> tuple[Calls, Calls]:
        """Launches that sum squares over all modes but one, in pieces, and those that make averages
        of them. ``where`` the mode is: first, last or between."""
        by_alignment: dict[int, list[tuple[int, Stack, int]]] = {}
        for number, s, mode in modes:
            runs = s.shape[mode] if where == 1 else math.prod(s.shape[mode + 1 :])
            by_alignment.setdefault(tiles.alignment(runs), []).append((number, s, mode))
        sums: Calls = []
        averages: Calls = []
        for align, mine in by_alignment.items():
            groups, finals, sizes = [], [], []
            for number, s, mode in mine:
                d, K = s.shape[mode], math.prod(s.shape) // s.shape[mode]
                post = math.prod(s.shape[mode + 1 :])
                others, _ = scales.others[id(s)][mode]
                groups.append([xs[number].tensor.data_ptr(), d, post, K, others.data_ptr()])
                lam = vectors.vectors[number][mode].data_ptr()
                finals.append([lam, d, K, _bits(limit(d)), self._marks_of(s).data_ptr()])
                sizes.append((len(s), d, K))
            places = tiles.squares(sizes)
            BN, BK = tiles.SQUARES["BN"], tiles.SQUARES["BK"]
            partial = torch.empty(len(places) * BN, device=self._device)
            kernel = self._mode_kernels.squares
            settings = dict(WHERE=where, BN=BN, BK=BK, ALIGN=align, num_warps=4)
            run = self._launch(kernel, groups, places, **settings)
            sums.append(functools.partial(run, partial))
            kernel = self._mode_kernels.eigenvalues
            run = self._launch(kernel, finals, tiles.sums(places), BN=BN, num_warps=1)
            averages.append(functools.partial(run, partial))
        return sums, averages

    # Values.

    def momentum(
        self,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        moments: Sequence[Tensor],
        beta: float,
        scale: ModeVectors,
        eps: float,
        factor: Any,
    ) -> None:
        """See :meth:`..ops.modes.ModeOperations.momentum`."""
        name = self._given(stacks, scale)
        factors = [factor] * len(stacks)
        state = tuple([m.data_ptr() for m in moments])
        build = functools.partial(self._by_modes, stacks, xs, moments, name, True)
        self._clear_absmax(stacks, xs)
        self._set_factors(stacks, factors)
        for launch in self._known(("momentum", name, state), stacks, xs, build):
            ran: list[bool] = []

            def run(rest: float, launch: Callable[..., None] = launch) -> None:
                launch(rest, eps)

            self.once(_noted, ran, run, 1 - beta)
            if not ran:  # the moments have learnt already: the direction alone
                run(0.0)

    def scale(
        self,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        factors: Sequence[Any] | ModeVectors,
    ) -> None:
        """See :meth:`..ops.base.Operations.scale`."""
        name: str | None = None
        if isinstance(factors, ModeVectors):
            name = self._given(stacks, factors)
            factors = [1.0] * len(stacks)
        build = functools.partial(self._by_modes, stacks, xs, [x.tensor for x in xs], name, False)
        self._clear_absmax(stacks, xs)
        self._set_factors(stacks, factors)
        for launch in self._known(("scale", name), stacks, xs, build):
            launch(0.0, 0.0)

    def _by_modes(
        self,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        moments: Sequence[Tensor],
        name: str | None,
        learns: bool,
    ) -> Calls:
        """Each to be called with (1 - beta, eps). name: of the scales, if there are any."""
        calls: Calls = []
        for order in sorted({len(s.shape) if name else 0 for s in stacks}):
            some, groups = [], []
            for s, x, m in zip(stacks, xs, moments, strict=True):
                if name and len(s.shape) != order:
                    continue
                some.append(s)
                tensors = x.tensor, m, self._absmax_of(s, x)
                more = self._marks_of(s), self._factors_of(s, [])
                words = self._words_of_modes(s, self._scales[name], range(order)) if name else []
                groups.append(
                    [
                        *(t.data_ptr() for t in tensors),
                        math.prod(s.shape),
                        *(t.data_ptr() for t in more),
                        *words,
                    ]
                )
            kernel = self._mode_kernels.momentum
            calls += self._elementwise(kernel, some, groups, 3, ORDER=order, LEARNS=learns)
        return calls

    def gram_of_modes(
        self,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        spares: Sequence[Place],
        beta: float,
        weight: float,
        mode: int | None,
        mean: bool,
        scale: ModeVectors | None,
    ) -> None:
        """:meth:`gram_ema` of one mode, of a mean, or scaled: ``mode`` None is each in turn.
        spares: memory for modes with others before and after, which come to the front there."""
        name = None if scale is None else self._given(stacks, scale)
        order = max((len(s.shape) for s in stacks), default=0)
        for number in range(order) if mode is None else [mode]:
            here = [i for i, s in enumerate(stacks) if resolved(s, number) is not None]
            if not here:
                continue
            some = [stacks[i] for i in here]
            mine, to = ([x[i] for i in here] for x in (xs, spares))
            for s, x, spare in zip(some, mine, to, strict=True):
                found = resolved(s, number)
                if found is not None and 0 < found < len(s.shape) - 1:
                    front = x.tensor.movedim(found + 1, 1)
                    spare.tensor.view(front.shape).copy_(front)
            build = functools.partial(self._grams_of_mode, some, mine, to, number, mean, name)
            key = "gram of mode", number, mean, name
            for launch in self._known(key, some, [*mine, *to], build):
                self.once(launch, beta, weight)

    def _grams_of_mode(
        self,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        spares: Sequence[Place],
        mode: int,
        mean: bool,
        name: str | None,
    ) -> Calls:
        operands = []
        for s, place, spare in zip(stacks, xs, spares, strict=True):
            found, last = resolved(s, mode), len(s.shape) - 1
            assert found is not None
            x = spare.tensor if 0 < found < last else place.tensor
            scales = self._scales[name].others[id(s)][found] if name and last else None
            operands.append(GramOperand(s, place, found, x, 0 < found == last, scales))
        return self._grams(operands, mean)

    def products_of_modes(
        self,
        stacks: Sequence[Stack],
        xs: Sequence[Place],
        targets: Sequence[Place],
        others: Sequence[Place],
        modes: Sequence[Sequence[int]],
        *,
        back: bool,
        orthogonal: bool,
        split: bool,
    ) -> list[Place]:
        """One product for each of a stack's ``modes``, from xs into targets and then to and fro
        between these and ``others``; where the results are. No mode changes its place."""
        sources, targets, others = list(xs), list(targets), list(others)
        for number in range(max(map(len, modes))):
            for where in range(3):
                here = [
                    i
                    for i, s in enumerate(stacks)
                    if number < len(modes[i]) and where == _where(s, modes[i][number])
                ]
                if not here:
                    continue
                some, mine = [stacks[i] for i in here], [modes[i][number] for i in here]
                a, b = ([x[i] for i in here] for x in (sources, targets))
                self._clear_absmax(some, b)
                build = functools.partial(
                    self._mode_products, some, a, b, mine, where, orthogonal, split
                )
                name = "mode products", tuple(mine), where, orthogonal, split
                for launch in self._known(name, some, [*a, *b], build):
                    if where == 0:
                        launch(A_ROWS=back, B_ROWS=False)
                    else:
                        launch(A_ROWS=True, B_ROWS=back)
                for i in here:
                    sources[i], targets[i], others[i] = targets[i], others[i], targets[i]
        return sources

    def _mode_products(
        self,
        stacks: Sequence[Stack],
        sources: Sequence[Place],
        targets: Sequence[Place],
        modes: Sequence[int],
        where: int,
        orthogonal: bool,
        split: bool,
    ) -> Calls:
        groups, sizes = [], []
        for s, x, y, mode in zip(stacks, sources, targets, modes, strict=True):
            d, rest = s.shape[mode], math.prod(s.shape) // s.shape[mode]
            top_q = self._ones if orthogonal else self._operator_absmax[id(s), mode]
            pairs = [(x.tensor, self._absmax_of(s, x)), (s.operators[mode], top_q)]
            # In the first mode Q'x or Q x, a row's columns being all other modes; else x Q or x Q'.
            (a, top_a), (b, top_b) = reversed(pairs) if where == 0 else pairs
            M, N = (d, rest) if where == 0 else (rest, d)
            tensors = a, b, y.tensor, top_a, top_b, self._absmax_of(s, y)
            post = math.prod(s.shape[mode + 1 :])
            groups.append([*(t.data_ptr() for t in tensors), M, N, d, post])
            sizes.append((range(len(s)), M, N, d))
        return self._multiply(groups, sizes, split, between=where == 2)


def _where(stack: Stack, mode: int) -> int:
    """0: the first mode of several, 1: the last one (of one, too), 2: between."""
    last = len(stack.shape) - 1
    return 1 if mode == last else 0 if mode == 0 else 2


def _modes(stacks: Sequence[Stack]) -> list[tuple[int, Stack, int]]:
    """(number of the stack, the stack, mode) of all modes."""
    return [(number, s, mode) for number, s in enumerate(stacks) for mode in range(len(s.shape))]


def _bits(value: float) -> int:
    """Of a number as float32; the largest one of infinity."""
    return struct.unpack("<i", struct.pack("<f", min(value, 3.4e38)))[0]


def _noted(ran: list[bool], run: Callable[[float], None], rest: float) -> None:
    run(rest)
    ran.append(True)
