"""The operations of rules, each by plain torch: right on every device, for any value.

A back end overrides those it does faster (:mod:`..gpu.triton_ops`). What every one of them promises
is tested on every back end alike, alone and composed at random.

State (moments, factors, vectors of modes) is changed by :meth:`Operations.gram_ema`,
:meth:`~Operations.ema`, :meth:`~Operations.adam`, :meth:`~Operations.momentum`,
:meth:`~Operations.mean_square_ema` and :meth:`~Operations.assign` alone: these call what changes it
through ``once``, so that a step that failed half-way can go on (:mod:`..journal`), and leave rows
alone whose gradient is bad (``stack.bad``, :mod:`..nonfinite`).
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise
from ..blocks.layout import Stack
from ..blocks.memory import joined
from ..blocks.rows import put, take
from ..journal import Once, directly
from ..nonfinite import Guard
from . import linalg
from .linalg import matmul_precision
from .modes import ModeOperations, kept_rows, mean_square, scaled
from .values import (
    GRADIENT,
    OWN,
    Hyper,
    ModeVectors,
    Operators,
    Place,
    Value,
    bias_corrections,
    resolved,
)


class Operations(ModeOperations):
    """What rules compute on values of some stacks.

    Stacks in one call may be of different orders: where a mode is named, those that have no such
    mode are left as they are; negative numbers count from each stack's last mode on. Operations
    that say they *use up* a value leave it unusable.

    Work is done in ``g`` and the stacks' work buffers; where there are none, in memory taken anew.
    Of the buffers that no value lives in, or else of all, an operation takes the one that was given
    out longest ago; what lived there is gone, and says so when it is used. For small models on a
    CPU, making views takes as long as the products: those are made once.

    Args:
        once: calls every operation that changes what it reads (:mod:`..journal`).
    """

    def __init__(self, once: Once = directly) -> None:
        self.once = once
        self._buffers: dict[int, list[Place]] = {}
        self._given = 0
        self._rotations: dict[Hashable, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._grams: dict[Hashable, list[linalg.GramOperand]] = {}
        self._pieces: dict[int, tuple[Sequence[Tensor], Sequence[list[Tensor]]]] = {}
        self._watches: dict[tuple[int, ...], noise.Watch] = {}
        self._watched: noise.Watch | None = None

    # What the step loop asks for, before and after a rule has its turn.

    def begin(self, precision: str = "highest") -> None:
        """A section of a step begins: no value lives but the gradients and what is kept."""
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
        """``g`` of the stacks, as gathered. kept: they are needed once more in this step."""
        return Value(stacks, [self.buffers(s)[GRADIENT] for s in stacks], kept)

    def gradients_gathered(self, stacks: Sequence[Stack], measured: bool = False) -> None:
        """``g`` of all stacks holds the gradients of this step. measured: the gather has measured
        the rows."""

    def judge(self, guard: Guard, present: Sequence[bool]) -> None:
        """Mark the rows of bad gradients, where the host does not know them."""
        guard.mark(present, self.once)

    def spare(self, stacks: Sequence[Stack]) -> None:
        """``g`` has just been gathered: rows that are marked as bad become zero."""
        for stack in stacks:
            if stack.bad is not None:
                _clear_bad_rows(stack, stack.g)

    def deliver(self, x: Value) -> None:
        """``g`` <- x, an update direction, which is used up."""
        for stack, place in zip(x.stacks, x.writable(), strict=True):
            if place.tensor is not stack.g:
                stack.g.copy_(place.tensor)
            place.holder = None

    def state_replaced(self) -> None:
        """State is other than what the last step left."""
        for watch in self._watches.values():
            watch.forget()

    # The operations of rules.

    @contextlib.contextmanager
    def write(self, x: Value) -> Iterator[list[Tensor]]:
        """x's tensors, one of each stack, for torch to write to: ``with ops.write(x) as xs:``.

        State is not written so, see :meth:`assign`.
        """
        places = x.writable()
        yield [place.tensor for place in places]
        for place in places:
            place.absmax_known = False

    def copy(self, x: Value, only: Callable[[Stack], bool] | None = None) -> Value:
        """A value like x (a gradient, or state) in other memory; of ``only`` such stacks."""
        kept = [
            (stack, place)
            for stack, place in zip(x.stacks, x.places(), strict=True)
            if only is None or only(stack)
        ]
        stacks, sources = [stack for stack, _ in kept], [place for _, place in kept]
        targets = [self._memory(s, place) for s, place in kept]
        if targets:
            tensors = [place.tensor for place in sources]
            torch._foreach_copy_([place.tensor for place in targets], tensors)
        for target in targets:
            target.absmax_known = False
        return Value(stacks, targets)

    @contextlib.contextmanager
    def accurate(self) -> Iterator[None]:
        """Products in the block are accurate to float32, whatever the section's precision: those of
        statistics."""
        with matmul_precision("highest"):
            yield

    def rotate(
        self,
        x: Value,
        operators: Operators,
        skip: int | None = None,
        scale: ModeVectors | None = None,
        only: int | None = None,
        keep: bool = False,
    ) -> Value:
        """Q_1' x_1 ... Q_k' x_k with the stacks' operators Q (Algorithm 2, line 10); uses x up.

        Stacks none of whose operators was computed yet are left as they are: theirs are the
        identity.

        Args:
            skip: this mode is left out, and stacks that lack it are left alone.
            scale: afterwards, entry j of every mode (but ``skip``) is multiplied by scale[j].
            only: this mode alone.
            keep: x stays, and the result is of those stacks alone that have the mode named.
        """
        if keep:
            x = self.copy(x, lambda stack: modes_of(stack, skip, only) is not None)
        x = self._through_modes(x, skip, only, back=False)
        if scale is not None:
            self._scale_but_one(x, scale, skip)
        return x

    def rotate_back(self, x: Value, operators: Operators, skip: int | None = None) -> Value:
        """Q_1 x_1 ... Q_k x_k: the inverse of :meth:`rotate` for bases; uses x up."""
        return self._through_modes(x, skip, None, back=True)

    def _through_modes(self, x: Value, skip: int | None, only: int | None, back: bool) -> Value:
        """The products of all modes but ``skip``, or of one; uses x up."""
        everywhere = skip is None and only is None
        results = []
        for stack, place in zip(x.stacks, x.writable(), strict=True):
            if stack.based:
                if everywhere and stack.work:
                    place = self._to_and_fro(stack, place, back)
                else:
                    place = self._in_its_place(stack, place, skip, only, back)
            results.append(place)
        return x.became(results)

    def _in_its_place(
        self, stack: Stack, place: Place, skip: int | None, only: int | None, back: bool
    ) -> Place:
        modes = modes_of(stack, skip, only)
        if modes is None:
            return place
        y = place.tensor
        if skip is None and only is None:
            y = (linalg.rotate_back if back else linalg.rotate)(y, stack.operators)
        else:
            for mode in modes:
                q = stack.operators[mode]
                y = linalg.rotate_mode(y, q.mT if back else q, mode)
        place.tensor.copy_(y)
        place.absmax_known = False
        return place

    def _to_and_fro(self, stack: Stack, place: Place, back: bool) -> Place:
        """One product a mode between two buffers; the result is in the other one or the first."""
        other = self._memory(stack, place)
        key = id(stack), place.number, other.number, back
        products = self._rotations.get(key)
        if products is None:
            make = linalg.products_to_and_fro
            products = make(place.tensor, other.tensor, stack.operators, back)
            self._rotations[key] = products
        for a, q, out in products:
            torch.bmm(a, q, out=out)
        place.absmax_known = other.absmax_known = False
        other.holder = None
        return place if len(stack.shape) % 2 == 0 else other

    def scale(
        self, x: Value, factors: Sequence[Any] | ModeVectors, skip: int | None = None
    ) -> None:
        """x <- factors x, in place.

        factors: a number or tensor [B, 1, ..., 1] of each stack; or vectors of modes, entry j of
        mode i (but ``skip``) being multiplied by the mode's vector[j].
        """
        places = x.writable()
        if isinstance(factors, ModeVectors):
            return self._scale_but_one(x, factors, skip)
        for factor, place in zip(factors, places, strict=True):
            place.tensor.mul_(factor)
            place.absmax_known = False

    def _scale_but_one(self, x: Value, vectors: ModeVectors, skip: int | None) -> None:
        """As :meth:`scale`, of the stacks that have the mode left out."""
        for s, place, mine in zip(x.stacks, x.places(), vectors.of(x.stacks), strict=True):
            if skip is None or resolved(s, skip) is not None:
                place.tensor.copy_(scaled(place.tensor, mine, resolved(s, skip)))
                place.absmax_known = False

    def norm(self, x: Value) -> list[Tensor]:
        """Frobenius norm of every block, [B, 1, ..., 1] of each stack."""
        return [linalg.norm(tensor) for tensor in x.tensors()]

    def mean_square(
        self, x: Value, mode: int, scale: ModeVectors | None = None
    ) -> list[Tensor | None]:
        """Mean over all other modes of x^2, [B, d_mode] of each stack; None of those that have no
        such mode. scale: of all modes but this one, applied to x first (x stays as it is)."""
        scales = [None] * len(x.stacks) if scale is None else scale.of(x.stacks)
        return [
            None if (found := resolved(stack, mode)) is None else mean_square(tensor, mine, found)
            for (stack, tensor), mine in zip(x.pairs(), scales, strict=True)
        ]

    def gram_ema(
        self,
        x: Value,
        beta: float,
        weight: float,
        mode: int | None = None,
        mean: bool = False,
        scale: ModeVectors | None = None,
    ) -> None:
        """factor_i <- beta factor_i + weight X_i X_i', X_i the mode-i matricization of x (Eq. 15).

        Args:
            mode: of this mode alone; else of all.
            mean: X_i X_i' is divided by the number of X_i's columns.
            scale: x is scaled in all modes but i first (and stays as it is).
        """
        for stack, place in zip(x.stacks, x.places(), strict=True):
            decay: float | Tensor = beta
            if stack.bad is not None:
                _clear_bad_rows(stack, place.tensor)
                decay = _unless_bad(stack, beta, 1.0)[..., None, None]
            for i, (factor, operand, copy) in enumerate(self._gram_operands(stack, place)):
                if mode is not None and i != resolved(stack, mode):
                    continue
                if scale is not None:
                    (mine,) = scale.of([stack])
                    operand = linalg.matricized(scaled(place.tensor, mine, i), i)
                elif copy is not None:
                    target, source = copy
                    target.copy_(source)
                w = weight / operand.x.shape[2] if mean else weight
                linalg.gram_ema_(factor, operand, decay, w, self.once)

    def ema(self, state: Value, x: Value, beta: float, square: bool = False) -> None:
        """state <- beta state + (1 - beta) x, or x^2 with ``square``; bad rows of x become zero."""
        for stack, old, tensor in zip(state.stacks, state.tensors(), x.tensors(), strict=True):
            _clear_bad_rows(stack, tensor)
            if square:
                if stack.bad is None:
                    self.once(old.mul_, beta)
                else:
                    self.once(old.mul_, stack.per_row(_unless_bad(stack, beta, 1.0)))
                self.once(old.addcmul_, tensor, tensor, value=1 - beta)
            else:
                self._lerp(stack, old, tensor, beta)

    def _lerp(self, stack: Stack, old: Tensor, new: Tensor, beta: float) -> None:
        """Rows of ``new`` that are bad are zero."""
        weight: float | Tensor = 1 - beta
        if stack.bad is not None:
            weight = stack.per_row(_unless_bad(stack, 1 - beta, 0.0))
        self.once(old.lerp_, new, weight)

    def assign(
        self, state: Value | ModeVectors, new: Sequence[Any], mode: int | None = None
    ) -> None:
        """state <- new, a tensor of each stack (None: it stays), computed from state as it is.

        state: vectors of modes with ``mode``, else a value.
        """
        if isinstance(state, ModeVectors):
            assert mode is not None
            olds: Sequence[Tensor | None] = state.mode(mode)
        else:
            olds = state.tensors()
        for stack, old, tensor in zip(state.stacks, olds, new, strict=True):
            if old is None or tensor is None:
                continue
            if stack.bad is not None:
                tensor = kept_rows(stack, old, tensor)
            self.once(old.copy_, tensor)

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
        """Update the moments m and v with x, and replace x by Adam's direction.

        Args:
            in_basis: x are coordinates in a basis; those that are noise (:mod:`..noise`) get the
                direction 0, where a basis was computed already.
            corrected: with Adam's bias corrections, else M / (sqrt(D) + eps).
            factors: a number or tensor [B, 1, ..., 1] or [] of each stack: times the direction.
        """
        work: dict[tuple[bool, bool], list[tuple[Any, ...]]] = {}
        places = x.writable()
        for s, place, old_m, old_v in zip(x.stacks, places, m.tensors(), v.tensors(), strict=True):
            c1, c2 = bias_corrections(s, h) if corrected else (1.0, 1.0)
            row = s, place.tensor, old_m, old_v, c1, c2
            work.setdefault((isinstance(c1, Tensor), s.bad is None), []).append(row)
        for (tensors, plain), rows in work.items():  # corrections: all tensors, or all numbers
            some, ys, ms, vs, c1s, c2s = map(list, zip(*rows, strict=True))
            if plain:
                if not tensors and len(set(zip(c1s, c2s, strict=True))) == 1:
                    ys, ms, vs = self._in_few_pieces(places, ys, ms, vs)
                linalg.moments_(ys, ms, vs, h.beta1, h.beta_d, self.once)
                linalg.direction_(ys, ms, vs, c1s, c2s, h.beta1, h.eps, h.nadam)
            else:
                for s, y, old_m, old_v in zip(some, ys, ms, vs, strict=True):
                    beta2 = s.per_row(_unless_bad(s, h.beta_d, 1.0))
                    _clear_bad_rows(s, y)
                    self._lerp(s, old_m, y, h.beta1)
                    self.once(old_v.mul_, beta2)
                    self.once(old_v.addcmul_, y, y, value=1 - h.beta_d)
                linalg.direction_(ys, ms, vs, c1s, c2s, h.beta1, h.eps, h.nadam)
                for s, y in zip(some, ys, strict=True):
                    _clear_bad_rows(s, y)
        for number, place in enumerate(places):
            if factors is not None:
                place.tensor.mul_(factors[number])
            place.absmax_known = False
        if in_basis:
            self._drop_noise(x, m, v, h)

    def _in_few_pieces(
        self, places: Sequence[Place], *lists: list[Tensor]
    ) -> Sequence[list[Tensor]]:
        """:func:`..blocks.memory.joined`, made once; of tensors in buffers, which last."""
        if OWN in [place.number for place in places]:
            return lists
        given = list(itertools.chain(*lists))
        known, pieces = self._pieces.get(id(given[0]), ((), ()))
        if len(known) != len(given) or not all(map(operator.is_, known, given)):
            pieces = joined(*lists)
            self._pieces[id(given[0])] = given, pieces
        return pieces

    def _drop_noise(self, x: Value, m: Value, v: Value, h: Hyper) -> None:
        turned = [i for i, s in enumerate(x.stacks) if s.based]
        if not turned:
            return
        ms, vs, xs = m.tensors(), v.tensors(), x.tensors()
        for number, traces in self._maybe_noisy(x, turned, vs, h):
            i = turned[number]
            c1, c2 = bias_corrections(x.stacks[i], h)
            xs[i].masked_fill_(noise.of(x.stacks[i], ms[i], vs[i], traces, c1, c2, h), 0.0)

    def _maybe_noisy(
        self, x: Value, turned: list[int], seconds: list[Tensor], h: Hyper
    ) -> list[tuple[int, Tensor]]:
        """(position in ``turned``, traces) of stacks with coordinates that may be noise. On a CPU
        looking costs something, see :class:`..noise.Watch`."""
        stacks = [x.stacks[i] for i in turned]
        key = tuple(map(id, stacks)) if h.noise_level > 0 else ()
        watch = self._watches.get(key)
        if watch is None and key and all(s.work and s.device.type == "cpu" for s in stacks):
            watch = self._watches[key] = noise.Watch(stacks, [seconds[i] for i in turned])
        if watch is not self._watched:  # others' moments changed meanwhile
            self.state_replaced()
            self._watched = watch
        if watch is not None:
            return watch.noisy(h)
        return [(i, noise.diagonal(s).sum(1)) for i, s in enumerate(stacks)] if key else []

    # For what is kept in a basis that changes, :class:`.basis_change.BasisChange`.

    def rotate_mode_(
        self, stack: Stack, x: Tensor, mode: int, rows: Sequence[int], back: bool
    ) -> None:
        """x[rows] <- their product in one mode with Q' (with Q if ``back``), Q the stack's
        operators. x: [B, *shape], state; ``g`` may be overwritten."""
        q = take(stack.operators[mode], rows)
        with matmul_precision("highest"):
            rotated = linalg.rotate_mode(take(x, rows), q.mT if back else q, mode)
            put(x, rows, rotated)

    def _memory(self, stack: Stack, source: Place) -> Place:
        """Memory for something new beside ``source``."""
        if not stack.work:
            return Place(torch.empty_like(source.tensor))
        places = self.buffers(stack)
        if len(places) == 2 and source.number >= 0 and not places[1 - source.number].taken:
            place = places[1 - source.number]  # there is no other
        else:
            others = [p for p in places if p is not source and not p.taken]
            candidates = [p for p in others if p.holder is None] or others
            if not candidates:
                raise RuntimeError("an operation finds no memory: the rule needs more work_buffers")
            place = min(candidates, key=_age)
        self._given += 1
        place.given = self._given
        return place

    def _gram_operands(self, stack: Stack, place: Place) -> Sequence[linalg.GramOperand]:
        """Per mode; kept where they are views of buffers."""
        spare: Place | None = None
        if len(stack.shape) > 2:  # a mode in between is copied, if there is a buffer to copy to
            spare = next((p for p in self.buffers(stack) if p.holder is None), None)
        if place.number == OWN or (len(stack.shape) > 2 and spare is None):
            return linalg.gram_operands(place.tensor, stack.factors)
        key = id(stack), place.number, OWN if spare is None else spare.number
        if key not in self._grams:
            to = None if spare is None else spare.tensor
            self._grams[key] = linalg.gram_operands(place.tensor, stack.factors, to)
        return self._grams[key]


def _age(place: Place) -> tuple[int, int]:
    return place.given, -place.number


def modes_of(stack: Stack, skip: int | None, only: int | None) -> list[int] | None:
    """All modes of a stack, but for one, or that one; None where it lacks the one that is named."""
    left_out, single = resolved(stack, skip), resolved(stack, only)
    if (skip is not None and left_out is None) or (only is not None and single is None):
        return None
    if single is not None:
        return [single]
    return [mode for mode in range(len(stack.shape)) if mode != left_out]


def _clear_bad_rows(stack: Stack, x: Tensor) -> None:
    """Zeros in rows [B, *shape] whose gradient is bad."""
    if stack.bad is not None:
        x.masked_fill_(stack.kept(), 0.0)


def _unless_bad(stack: Stack, value: float, otherwise: float) -> Tensor:
    """Per row of the stack [B]: value, but ``otherwise`` for rows whose gradient is bad."""
    assert stack.bad is not None
    values = torch.full_like(stack.bad, value, dtype=stack.dtype)
    return values.masked_fill_(stack.bad != 0, otherwise)
