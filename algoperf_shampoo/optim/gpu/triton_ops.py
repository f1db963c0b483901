"""The operations of rules on a GPU: the hot ones by our kernels, one launch, or a few, for all
stacks; the others by torch, as they are.

Products need the largest entry of every row of what they multiply. Kernels find those of what they
leave; where something else wrote, they are measured before they are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..blocks.layout import Stack
from ..journal import Once, directly
from ..nonfinite import Guard
from ..ops import Hyper, ModeVectors, Operations, Operators, Value
from ..ops.values import GRADIENT, OWN, Place
from .launches import KernelLaunches

log = logging.getLogger(__name__)


class TritonOperations(Operations):
    """:class:`~..ops.base.Operations` for float32 stacks on one GPU, all rows taking part.

    For how accurate they are see :class:`.launches.KernelLaunches`.

    Args:
        stacks: all stacks there will be.
        once: see :mod:`..journal`.
    """

    def __init__(self, stacks: Sequence[Stack], once: Once = directly) -> None:
        super().__init__(once)
        self._kernels = KernelLaunches(stacks, once)
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
        if not measured:
            self._kernels.measure(stacks, [self.buffers(s)[GRADIENT] for s in stacks])

    def judge(self, guard: Guard, present: Sequence[bool]) -> None:
        self._kernels.judge(guard, present)

    def spare(self, stacks: Sequence[Stack]) -> None:
        """Kernels leave bad rows out where they write moments and factors."""

    def gram_ema(
        self, x: Value, beta: float, weight: float, mode: int | None = None, mean: bool = False
    ) -> None:
        places = x.places()
        if mode is not None or mean or any(place.number == OWN for place in places):
            self._default("gram_ema of one mode, of a mean or of state")
            return super().gram_ema(x, beta, weight, mode, mean)
        self._measure(x.stacks, places)
        spares = [
            self._memory(s, place) if len(s.shape) > 2 else place
            for s, place in zip(x.stacks, places, strict=True)
        ]
        for place, spare in zip(places, spares, strict=True):
            if spare is not place:
                spare.holder, spare.absmax_known = None, False
        return self._kernels.gram_ema(x.stacks, places, spares, beta, weight)

    def adam(
        self,
        x: Value,
        m: Value,
        v: Value,
        h: Hyper,
        *,
        in_basis: bool = False,
        corrected: bool = True,
    ) -> None:
        places = x.writable()
        limited = [in_basis and h.noise_level > 0 and s.based for s in x.stacks]
        if some := [s for s, yes in zip(x.stacks, limited, strict=True) if yes]:
            self._kernels.limits(some, h)
        moments = list(zip(m.tensors(), v.tensors(), strict=True))
        self._kernels.adam(x.stacks, places, moments, h, limited, corrected)
        for place in places:
            place.absmax_known = True

    def rotate(
        self,
        x: Value,
        operators: Operators,
        skip: int | None = None,
        scale: ModeVectors | None = None,
    ) -> Value:
        if skip is not None:
            self._default("rotate all modes but one")
            return super().rotate(x, operators, skip, scale)
        y = self._products(x, operators, back=False)
        if scale is not None:
            self.scale(y, scale)
        return y

    def rotate_back(self, x: Value, operators: Operators, skip: int | None = None) -> Value:
        if skip is not None:
            self._default("rotate back all modes but one")
            return super().rotate_back(x, operators, skip)
        return self._products(x, operators, back=True)

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
        self._default("scale")
        super().scale(x, factors, skip)

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
