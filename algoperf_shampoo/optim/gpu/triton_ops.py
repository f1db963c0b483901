"""The operations of rules on a GPU: the hot ones by our kernels, one launch, or a few, for all
stacks; the others by torch, as they are.

Products need the largest entry of every row of what they multiply. Kernels find those of what they
leave; where something else wrote, they are measured before they are needed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks.layout import Stack
from ..journal import Once, directly
from ..nonfinite import Guard
from ..ops import Hyper, ModeVectors, Operations, Operators, Value
from ..ops.base import modes_of
from ..ops.modes import Limit
from ..ops.values import GRADIENT, OWN, Place
from .mode_launches import ModeLaunches

log = logging.getLogger(__name__)


class TritonOperations(Operations):
    """:class:`~..ops.base.Operations` for float32 stacks on one GPU, all rows taking part.

    For how accurate they are see :class:`.launches.KernelLaunches`. Vectors of modes in one call
    must be those of all stacks that the call is about.

    Args:
        stacks: all stacks there will be.
        once: see :mod:`..journal`.
        others: those of other ranks' blocks.
    """

    def __init__(
        self, stacks: Sequence[Stack], once: Once = directly, others: Sequence[Stack] = ()
    ) -> None:
        super().__init__(once)
        self._kernels = ModeLaunches(stacks, once, others)
        self._precision = "highest"
        self._by_default: set[str] = set()

    @property
    def row_absmax_of_gradients(self) -> Tensor:
        """The largest entries of all rows of ``g``, which a gather may leave there."""
        return self._kernels.row_absmax_of_gradients

    def begin(self, precision: str = "highest") -> None:
        super().begin(precision)
        self._precision = precision
        for places in self._buffers.values():
            for place in places:
                place.absmax_known = place.number == GRADIENT

    def buffers(self, stack: Stack) -> list[Place]:
        new = id(stack) not in self._buffers
        places = super().buffers(stack)
        if new:
            places[GRADIENT].absmax_known = True
        return places

    def gradients_gathered(self, stacks: Sequence[Stack], measured: bool = False) -> None:
        if not measured and stacks:
            self._kernels.measure(stacks, [self.buffers(s)[GRADIENT] for s in stacks])

    def judge(self, guard: Guard, present: Sequence[bool]) -> None:
        self._kernels.judge(guard, present)

    def spare(self, stacks: Sequence[Stack]) -> None:
        """Kernels leave bad rows out where they write moments and factors."""

    @contextlib.contextmanager
    def accurate(self) -> Iterator[None]:
        before, self._precision = self._precision, "highest"
        try:
            with super().accurate():
                yield
        finally:
            self._precision = before

    def gram_ema(
        self,
        x: Value,
        beta: float,
        weight: float,
        mode: int | None = None,
        mean: bool = False,
        scale: ModeVectors | None = None,
    ) -> None:
        places = x.places()
        if any(place.number == OWN for place in places):
            self._default("gram_ema of state")
            return super().gram_ema(x, beta, weight, mode, mean, scale)
        self._measure(x.stacks, places)
        spares = [
            self._memory(s, place) if len(s.shape) > 2 else place
            for s, place in zip(x.stacks, places, strict=True)
        ]
        for place, spare in zip(places, spares, strict=True):
            if spare is not place:
                spare.holder, spare.absmax_known = None, False
        if mode is None and not mean and scale is None:
            return self._kernels.gram_ema(x.stacks, places, spares, beta, weight)
        return self._kernels.gram_of_modes(
            x.stacks, places, spares, beta, weight, mode, mean, scale
        )

    def adam(
        self,
        x: Value,
        m: Value,
        v: Value,
        h: Hyper,
        *,
        in_basis: bool = False,
        corrected: bool = True,
        factors: Sequence[Any] | None = None,
    ) -> None:
        places = x.writable()
        limited = [in_basis and h.noise_level > 0 and s.based for s in x.stacks]
        if some := [s for s, yes in zip(x.stacks, limited, strict=True) if yes]:
            self._kernels.limits(some, h)
        moments = list(zip(m.tensors(), v.tensors(), strict=True))
        self._kernels.adam(x.stacks, places, moments, h, limited, corrected, factors)
        for place in places:
            place.absmax_known = True

    def rotate(
        self,
        x: Value,
        operators: Operators,
        skip: int | None = None,
        scale: ModeVectors | None = None,
        only: int | None = None,
        keep: bool = False,
    ) -> Value:
        if skip is None and only is None and not keep:
            y = self._products(x, operators, back=False)
        else:
            modes = [modes_of(s, skip, only) for s in x.stacks]
            y = self._products_of_modes(x, operators, modes, back=False, keep=keep)
        if scale is not None and skip is None:
            self.scale(y, scale)
        elif scale is not None:
            self._default("scale after rotate all modes but one")
            self._scale_but_one(y, scale, skip)
        return y

    def rotate_back(self, x: Value, operators: Operators, skip: int | None = None) -> Value:
        if skip is None:
            return self._products(x, operators, back=True)
        modes = [modes_of(s, skip, None) for s in x.stacks]
        return self._products_of_modes(x, operators, modes, back=True)

    def _products_of_modes(
        self,
        x: Value,
        operators: Operators,
        modes: Sequence[Sequence[int] | None],
        back: bool,
        keep: bool = False,
    ) -> Value:
        """modes: of each stack; None: it lacks the mode that is named."""
        places = x.places() if keep else x.writable()
        results = dict(enumerate(places))
        works = [i for i, s in enumerate(x.stacks) if modes[i] and s.based]
        with x.held() if keep else contextlib.nullcontext():
            if keep:
                results = {i: p for i, p in results.items() if modes[i] is not None}
                results |= self._copies(x, [i for i in results if i not in works])
            if works:
                done = self._rotated(x, operators, works, modes, back, keep)
                results |= zip(works, done, strict=True)
        if keep:
            return Value([x.stacks[i] for i in results], list(results.values()))
        return x.became(list(results.values()))

    def _copies(self, x: Value, numbers: Sequence[int]) -> dict[int, Place]:
        places = x.places()
        copies = {i: self._memory(x.stacks[i], places[i]) for i in numbers}
        if copies:
            torch._foreach_copy_(
                [place.tensor for place in copies.values()], [places[i].tensor for i in copies]
            )
        for place in copies.values():
            place.absmax_known = False
        return copies

    def _rotated(
        self,
        x: Value,
        operators: Operators,
        numbers: Sequence[int],
        modes: Sequence[Sequence[int] | None],
        back: bool,
        keep: bool,
    ) -> list[Place]:
        stacks, places = [x.stacks[i] for i in numbers], x.places()
        sources, mine = [places[i] for i in numbers], [modes[i] or [] for i in numbers]
        targets = [self._memory(s, place) for s, place in zip(stacks, sources, strict=True)]
        others = sources
        if keep:  # to and fro beside x, where there is more than one product
            others = [
                self._memory(s, place) if len(some) > 1 else place
                for s, place, some in zip(stacks, targets, mine, strict=True)
            ]
        self._measure(stacks, sources)
        if not operators.orthogonal:
            self._kernels.measure_operators(stacks)
        done = self._kernels.products_of_modes(
            stacks,
            sources,
            targets,
            others,
            mine,
            back=back,
            orthogonal=operators.orthogonal,
            split=self._precision == "highest",
        )
        for place in (*targets, *others):
            place.holder, place.absmax_known = None, True
        return done

    def _products(self, x: Value, operators: Operators, back: bool) -> Value:
        results = list(x.writable())
        some = [i for i, s in enumerate(x.stacks) if s.based]
        if not some:
            return x.became(results)
        stacks, sources = [x.stacks[i] for i in some], [results[i] for i in some]
        targets = [self._memory(s, place) for s, place in zip(stacks, sources, strict=True)]
        self._measure(stacks, sources)
        if not operators.orthogonal:
            self._kernels.measure_operators(stacks)
        found = self._kernels.products(
            stacks,
            sources,
            targets,
            back=back,
            orthogonal=operators.orthogonal,
            split=self._precision == "highest",
        )
        for place in (*sources, *targets):
            place.holder, place.absmax_known = None, True
        for i, place in zip(some, found, strict=True):
            results[i] = place
        return x.became(results)

    def rotate_mode_(
        self, stack: Stack, x: Tensor, mode: int, rows: Sequence[int], back: bool
    ) -> None:
        self._kernels.rotate_mode_(stack, x, mode, rows, back, stack.g, stack.work[0])

    def scale(
        self, x: Value, factors: Sequence[Any] | ModeVectors, skip: int | None = None
    ) -> None:
        if skip is not None:
            self._default("scale all modes but one")
            return super().scale(x, factors, skip)
        places = x.writable()
        self._kernels.scale(x.stacks, places, factors)
        for place in places:
            place.absmax_known = True
        return None

    def momentum(
        self,
        x: Value,
        m: Value,
        beta: float,
        scale: ModeVectors,
        eps: float,
        factor: Any,
    ) -> None:
        places = x.writable()
        self._kernels.momentum(x.stacks, places, m.tensors(), beta, scale, eps, factor)
        for place in places:
            place.absmax_known = True

    def inverse_sqrt(self, vectors: ModeVectors, limit: Limit) -> ModeVectors:
        return self._kernels.inverse_sqrt(vectors, limit)

    def mean_square_ema(
        self, vectors: ModeVectors, x: Value, beta: float, scale: ModeVectors, limit: Limit
    ) -> None:
        self._kernels.mean_square_ema(vectors, x.places(), beta, scale, limit)

    def norm(self, x: Value) -> list[Tensor]:
        self._default("norm")
        return super().norm(x)

    def mean_square(
        self, x: Value, mode: int, scale: ModeVectors | None = None
    ) -> list[Tensor | None]:
        self._default("mean_square")
        return super().mean_square(x, mode, scale)

    def ema(self, state: Value, x: Value, beta: float, square: bool = False) -> None:
        self._default("ema")
        super().ema(state, x, beta, square)

    def _measure(self, stacks: Sequence[Stack], places: Sequence[Place]) -> None:
        """See to it that the largest entries of the rows of places are known."""
        if all(place.absmax_known for place in places):
            return
        unknown = [i for i, place in enumerate(places) if not place.absmax_known]
        self._kernels.measure([stacks[i] for i in unknown], [places[i] for i in unknown])
        for i in unknown:
            places[i].absmax_known = True

    def _default(self, name: str) -> None:
        """An operation is about to run as torch's, one stack after the other."""
        if name not in self._by_default:
            self._by_default.add(name)
            log.info("%s runs by torch here, one stack after the other: we have no kernel", name)
