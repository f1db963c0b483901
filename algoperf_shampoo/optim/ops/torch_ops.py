"""Operations by torch in memory that is there already, for stacks that have buffers to work in.

For small models on a CPU, making views takes as long as the products: those are made once.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from .. import noise
from ..blocks.layout import Stack
from ..journal import Once, directly
from . import linalg
from .base import Operations
from .hyper import Hyper, bias_corrections
from .values import GRADIENT, ModeVectors, Operators, Place, Value


class TorchOperations(Operations):
    """:class:`~.base.Operations` for whole stacks, in ``g`` and their work buffers.

    Of the buffers that no value lives in, or else of all that work is done in, an operation takes
    the one that was given out longest ago; what lived there is gone, and says so when it is used.
    """

    def __init__(self, once: Once = directly) -> None:
        super().__init__(once)
        self._buffers: dict[int, list[Place]] = {}
        self._given = 0
        self._rotations: dict[Hashable, Rotation] = {}
        self._matrices: dict[Hashable, Tensor] = {}
        self._grams: dict[Hashable, list[tuple[Tensor, Tensor]]] = {}
        self._watches: dict[tuple[int, ...], noise.Watch] = {}
        self._watched: tuple[int, ...] = ()

    def begin(self, precision: str = "highest") -> None:
        self._given = 0
        for places in self._buffers.values():
            for place in places:
                place.holder, place.given = None, 0

    def buffers(self, stack: Stack) -> list[Place]:
        """``g``, and the stack's work buffers."""
        places = self._buffers.get(id(stack))
        if places is None:
            tensors = [stack.g, *stack.work]
            places = self._buffers[id(stack)] = [Place(x, i) for i, x in enumerate(tensors)]
        return places

    def gradients(self, stacks: Sequence[Stack], kept: bool) -> Value:
        return Value(stacks, [self.buffers(s)[GRADIENT] for s in stacks], kept)

    def _memory(self, stack: Stack, source: Place) -> Place:
        places = self.buffers(stack)
        if len(places) == 2 and source.number >= 0 and not places[1 - source.number].taken:
            place = places[1 - source.number]  # there is no other
        else:
            others = [p for p in places if p is not source and not p.taken]
            candidates = [p for p in others if p.holder is None] or others
            if not candidates:
                raise RuntimeError("an operation finds no memory: the rule needs more work_buffers")
            place = min(candidates, key=lambda p: (p.given, -p.number))
        self._given += 1
        place.given = self._given
        return place

    def rotate(
        self,
        x: Value,
        operators: Operators,
        skip: int | None = None,
        scale: ModeVectors | None = None,
    ) -> Value:
        if skip is not None or scale is not None:
            return super().rotate(x, operators, skip, scale)
        return self._through_all_modes(x, back=False)

    def rotate_back(self, x: Value, operators: Operators, skip: int | None = None) -> Value:
        if skip is not None:
            return super().rotate_back(x, operators, skip)
        return self._through_all_modes(x, back=True)

    def _through_all_modes(self, x: Value, back: bool) -> Value:
        """The result of as many products as there are modes is in the other buffer, or in x's."""
        results = []
        for stack, source in zip(x.stacks, x.writable(), strict=True):
            if not stack.based:
                results.append(source)
                continue
            target = self._memory(stack, source)
            key = id(stack), source.number, target.number, back
            if key not in self._rotations:
                self._rotations[key] = Rotation(stack, source.tensor, target.tensor, back)
            self._rotations[key]()
            source.absmax_known = target.absmax_known = False
            target.holder = None
            results.append(source if len(stack.shape) % 2 == 0 else target)
        return x.became(results)

    def gram_ema(
        self, x: Value, beta: float, weight: float, mode: int | None = None, mean: bool = False
    ) -> None:
        if mode is not None or mean or any(stack.bad is not None for stack in x.stacks):
            return super().gram_ema(x, beta, weight, mode, mean)
        for stack, place in zip(x.stacks, x.places(), strict=True):
            key = id(stack), place.number
            if key not in self._grams:
                modes = enumerate(stack.factors)
                pairs = [(f, self._matricized(stack, place, i)) for i, f in modes]
                if len(stack.shape) < 3:  # else those of modes in between are copies
                    self._grams[key] = pairs
            else:
                pairs = self._grams[key]
            for factor, rows in pairs:
                linalg.gram_ema_(factor, rows, beta, weight, self.once)
        return None

    def _matricized(self, stack: Stack, place: Place, mode: int) -> Tensor:
        """Kept where it is a view."""
        if 0 < mode < len(stack.shape) - 1:
            return linalg.matricized(place.tensor, mode)
        key = id(stack), place.number, mode
        if key not in self._matrices:
            self._matrices[key] = linalg.matricized(place.tensor, mode)
        return self._matrices[key]

    def _drop_noise(self, x: Value, m: Value, v: Value, h: Hyper) -> None:
        """On a CPU, looking for it costs something: see :class:`..noise.Watch`."""
        turned = [i for i, s in enumerate(x.stacks) if s.based]
        if not turned:
            return
        if any(x.stacks[i].device.type != "cpu" for i in turned):
            return super()._drop_noise(x, m, v, h)
        stacks = [x.stacks[i] for i in turned]
        key = tuple([id(s) for s in stacks]) if h.noise_level > 0 else ()
        if key != self._watched:  # others' moments changed meanwhile
            self.state_replaced()
            self._watched = key
        if h.noise_level == 0:
            return None
        ms, vs, xs = m.tensors(), v.tensors(), x.tensors()
        if key not in self._watches:
            self._watches[key] = noise.Watch(stacks, [vs[i] for i in turned])
        for number, traces in self._watches[key].noisy(h):
            i = turned[number]
            c1, c2 = bias_corrections(x.stacks[i], h)
            xs[i].masked_fill_(noise.of(x.stacks[i], ms[i], vs[i], traces, c1, c2, h), 0.0)
        return None

    def state_replaced(self) -> None:
        for watch in self._watches.values():
            watch.forget()


class Rotation:
    """The products that rotate a stack (or turn it back), each contracting the leading mode and
    appending it at the back (see :func:`..linalg.rotate`); to and fro between two buffers."""

    def __init__(self, stack: Stack, source: Tensor, target: Tensor, back: bool) -> None:
        self._products = []
        for d, q in zip(stack.shape, stack.operators, strict=True):
            a, out = source.view(len(stack), d, -1).mT, target.view(len(stack), -1, d)
            self._products.append((a, q.mT if back else q, out))
            source, target = target, source

    def __call__(self) -> None:
        for a, q, out in self._products:
            torch.bmm(a, q, out=out)
