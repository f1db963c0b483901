"""What rules compute on stacks: statistics, rotations, Adam. Here by torch.

:mod:`.gpu.grouped` does the same on a GPU by kernels of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import linalg, noise
from .buckets import Stack
from .eigen.jobs import put, take
from .journal import Once, directly
from .nonfinite import Guard
from .precision import matmul_precision


class Hyper(NamedTuple):
    """Hyperparameters of one step, the paper's symbols beside."""

    lr: float | Tensor  # alpha_t
    beta1: float
    beta2: float
    eps: float  # epsilon
    weight_decay: float  # lambda
    nadam: bool  # numerator beta1 M + (1 - beta1) G instead of M
    matmul_precision: str  # of rotations; statistics are float32-accurate under every setting
    # id(stack) -> 1 - beta1^t and 1 - beta2^t of its rows as tensors [B, 1, ..., 1] on the device,
    # always the same ones; None: the stack's own numbers.
    corrections: Mapping[int, tuple[Tensor, Tensor]] | None = None
    skip: bool = False  # whether gradients that are not finite are left out
    noise_level: float = 0.0  # see :mod:`.noise`; 0: nothing is left out


def bias_corrections(stack: Stack, h: Hyper) -> tuple[float | Tensor, float | Tensor]:
    """1 - beta1^t and 1 - beta2^t: numbers, or [B, 1, ..., 1] each."""
    if h.corrections is not None:
        return h.corrections[id(stack)]
    return stack.bias_correction(h.beta1), stack.bias_correction(h.beta2)


class Arithmetic:
    """The operations of :class:`~.preconditioners.base.Rule`, on lists of stacks.

    Tensors in ``xs`` are shaped like the stacks' blocks, [B, *shape]. They may be overwritten:
    what counts afterwards is what a method returns.

    Stacks that have a ``scratch`` buffer are turned to and fro between it and ``g``, through views
    that are made once: for small models making them takes as long as the products.

    Rows that ``stack.bad`` marks on the device keep what they have (:mod:`.nonfinite`).

    Args:
        once: calls every operation that changes what it reads (:mod:`.journal`).
    """

    def __init__(self, once: Once = directly) -> None:
        self.once = once
        self._turns: dict[tuple[int, int, bool], Turn] = {}
        self._matrices: dict[tuple[int, int], Tensor] = {}
        self._watches: dict[tuple[int, ...], noise.Watch] = {}
        self._watched: tuple[int, ...] = ()

    def gradients_came(self, stacks: Sequence[Stack]) -> None:
        """``stack.g`` of all stacks holds the gradients of this step."""

    def judge(self, guard: Guard, present: Sequence[bool]) -> None:
        """Mark the rows of bad gradients, where the host does not know them."""
        guard.mark(present, self.once)

    def spare(self, stacks: Sequence[Stack]) -> None:
        """``stack.g`` has just been gathered: rows that are marked as bad become zero."""
        for stack in stacks:
            if stack.bad is not None:
                stack.g.masked_fill_(stack.kept(), 0.0)

    def gram_ema(self, stacks: Sequence[Stack], beta: float, weight: float) -> None:
        """factor_i <- beta factor_i + weight X_i X_i', X_i the mode-i matricization of ``g``
        (Eq. 15)."""
        for stack in stacks:
            decay = beta if stack.bad is None else _unless_bad(stack, beta, 1.0)[..., None, None]
            for mode, factor in enumerate(stack.factors):
                rows = self._matricized(stack, mode)
                linalg.gram_ema_(factor, rows, decay, weight, self.once)

    def average(self, stacks: Sequence[Stack], xs: Sequence[Tensor], h: Hyper) -> None:
        """exp_avg <- beta1 exp_avg + (1 - beta1) x. Rows of xs that are bad become zero."""
        for stack, x in zip(stacks, xs, strict=True):
            weight: float | Tensor = 1 - h.beta1
            if stack.bad is not None:
                x.masked_fill_(stack.kept(), 0.0)
                weight = stack.per_row(_unless_bad(stack, 1 - h.beta1, 0.0))
            self.once(stack.state["exp_avg"].lerp_, x, weight)

    def adam(self, stacks: Sequence[Stack], xs: Sequence[Tensor], h: Hyper) -> None:
        """Update exp_avg and exp_avg_sq with xs, and replace these by Adam's direction."""
        work: dict[tuple[bool, bool], list[tuple[Any, ...]]] = {}
        for s, x in zip(stacks, xs, strict=True):
            c1, c2 = bias_corrections(s, h)
            row = s, x, s.state["exp_avg"], s.state["exp_avg_sq"], c1, c2
            work.setdefault((isinstance(c1, Tensor), s.bad is None), []).append(row)
        for (_, plain), rows in work.items():  # corrections are all tensors, or all numbers
            some, ys, ms, vs, c1s, c2s = map(list, zip(*rows, strict=True))
            if plain:
                moments_(ys, ms, vs, h.beta1, h.beta2, self.once)
            else:
                for s, x in zip(some, ys, strict=True):
                    beta2 = s.per_row(_unless_bad(s, h.beta2, 1.0))
                    self.average([s], [x], h)
                    self.once(s.state["exp_avg_sq"].mul_, beta2)
                    self.once(s.state["exp_avg_sq"].addcmul_, x, x, value=1 - h.beta2)
            direction_(ys, ms, vs, c1s, c2s, h.beta1, h.eps, h.nadam)
            for s, x in zip(some, ys, strict=True):
                if s.bad is not None:
                    x.masked_fill_(s.kept(), 0.0)

    def adam_in_basis(self, stacks: Sequence[Stack], xs: Sequence[Tensor], h: Hyper) -> None:
        """:meth:`adam` for what :meth:`rotate` returned; coordinates that are noise
        (:mod:`.noise`) get the direction 0."""
        self.adam(stacks, xs, h)
        plain = all(s.scratch is not None and s.device.type == "cpu" for s in stacks)
        key = tuple([id(s) for s in stacks]) if plain and h.noise_level > 0 else ()
        if key != self._watched:  # others' moments changed meanwhile
            self.state_replaced()
            self._watched = key
        if h.noise_level == 0:
            return
        if plain:
            if key not in self._watches:
                self._watches[key] = noise.Watch(stacks)
            noisy = self._watches[key].noisy(h)
        else:
            noisy = [(i, noise.diagonal(s).sum(1)) for i, s in enumerate(stacks)]
        for i, traces in noisy:
            c1, c2 = bias_corrections(stacks[i], h)
            xs[i].masked_fill_(noise.of(stacks[i], traces, c1, c2, h), 0.0)

    def state_replaced(self) -> None:
        """Moments and factors are others than the last step left."""
        for watch in self._watches.values():
            watch.forget()

    def copy_of_gradients(self, stacks: Sequence[Stack]) -> list[Tensor]:
        """Copies of ``g``."""
        return [s.g.clone() if s.scratch is None else s.scratch.copy_(s.g) for s in stacks]

    def rotate(
        self, stacks: Sequence[Stack], xs: Sequence[Tensor], h: Hyper, orthogonal: bool = True
    ) -> list[Tensor]:
        """Q_1' x_1 ... Q_k' x_k with the stacks' operators Q (Algorithm 2, line 10).

        xs: the gradients ``g``, or copies of them, which may have been changed if the operators
        are not ``orthogonal``. ``g`` may be overwritten.
        """
        return [
            linalg.rotate(x, s.operators) if s.scratch is None else self._turn(s, x, back=False)
            for s, x in zip(stacks, xs, strict=True)
        ]

    def rotate_back(self, stacks: Sequence[Stack], xs: Sequence[Tensor], h: Hyper) -> None:
        """``g`` <- Q_1 x_1 ... Q_k x_k, xs being what :meth:`rotate` and :meth:`adam` made of
        ``g``."""
        for stack, x in zip(stacks, xs, strict=True):
            if stack.scratch is None:
                linalg.rotate_back(x, stack.operators, out=stack.g)
            else:  # as many products as the way there: the last one ends in `g`
                self._turn(stack, x, back=True)

    def _turn(self, stack: Stack, x: Tensor, back: bool) -> Tensor:
        """x, in ``g`` or ``scratch``, through all modes, as :func:`.linalg.rotate` does."""
        key = id(stack), x.data_ptr(), back
        if key not in self._turns:
            self._turns[key] = Turn(stack, x, back)
        return self._turns[key]()

    def _matricized(self, stack: Stack, mode: int) -> Tensor:
        """:func:`.linalg.matricized` ``g``, kept where it is a view."""
        if stack.scratch is None or 0 < mode < len(stack.shape) - 1:
            return linalg.matricized(stack.g, mode)
        key = id(stack), mode
        if key not in self._matrices:
            self._matrices[key] = linalg.matricized(stack.g, mode)
        return self._matrices[key]

    def rotate_mode_(
        self, stack: Stack, x: Tensor, mode: int, rows: Sequence[int], back: bool
    ) -> None:
        """x[rows] <- their product in one mode with Q' (with Q if ``back``), Q the stack's
        operators. x: [B, *shape], not ``g``, which may be overwritten."""
        q = take(stack.operators[mode], rows)
        with matmul_precision("highest"):
            rotated = linalg.rotate_mode(take(x, rows), q.mT if back else q, mode)
            put(x, rows, rotated)


class Turn:
    """The products that rotate a stack (or turn it back), each contracting the leading mode and
    appending it at the back; between ``g`` and ``scratch``, starting from x, one of them."""

    def __init__(self, stack: Stack, x: Tensor, back: bool) -> None:
        assert stack.scratch is not None
        in_g = x.data_ptr() == stack.g.data_ptr()
        source, target = (stack.g, stack.scratch) if in_g else (stack.scratch, stack.g)
        self._products = []
        for d, q in zip(stack.shape, stack.operators, strict=True):
            a, out = source.view(len(stack), d, -1).mT, target.view(len(stack), -1, d)
            self._products.append((a, q.mT if back else q, out))
            source, target = target, source
        self._result = source

    def __call__(self) -> Tensor:
        for a, q, out in self._products:
            torch.bmm(a, q, out=out)
        return self._result


def _unless_bad(stack: Stack, value: float, otherwise: float) -> Tensor:
    """Per row of the stack [B]: value, but ``otherwise`` for rows whose gradient is bad."""
    assert stack.bad is not None
    values = torch.full_like(stack.bad, value, dtype=stack.dtype)
    return values.masked_fill_(stack.bad != 0, otherwise)


def moments_(
    xs: list[Tensor], ms: list[Tensor], vs: list[Tensor], beta1: float, beta2: float, once: Once
) -> None:
    """Update both moments by x. xs, ms, vs: contiguous, of one shape [B, ...] and dtype each.

    The order of operations, here and in :func:`direction_`, is torch.optim.AdamW's, so that the
    two agree to rounding.
    """
    once(torch._foreach_mul_, vs, beta2)
    once(torch._foreach_addcmul_, vs, xs, xs, value=1 - beta2)
    once(torch._foreach_lerp_, ms, xs, 1 - beta1)


def direction_(
    xs: list[Tensor],
    ms: list[Tensor],
    vs: list[Tensor],
    c1: list[Any],
    c2: list[Any],
    beta1: float,
    eps: float,
    nadam: bool,
) -> None:
    """Replace x by Adam's direction (NAdam's numerator with ``nadam``).

    c1, c2 = 1 - beta1^t, 1 - beta2^t: all numbers, or all tensors [B, 1, ..., 1] on x's device.
    """
    if nadam:
        torch._foreach_lerp_(xs, ms, beta1)
    else:
        torch._foreach_copy_(xs, ms)
    denominators = torch._foreach_sqrt(vs)
    torch._foreach_div_(denominators, [c**0.5 for c in c2])
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(denominators, c1)
    torch._foreach_div_(xs, denominators)
