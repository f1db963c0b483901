"""What operations take and give, and the hyperparameters of a step.

A :class:`Value` is one tensor of each of some stacks. It knows the memory it lies in and what is
known of its entries there, so that no operation relies on what another one left behind: memory that
was given to another value, or a value that an operation used up, is an error at once, on every
device.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..blocks.layout import Stack

# Numbers of buffers: the gradients', those a rule works in from 1 on, and memory of its own.
GRADIENT, OWN = 0, -1


class Place:
    """Memory shaped like the blocks of one stack.

    Attributes:
        tensor: [B, *shape], contiguous.
        number: of the buffer it is a part of.
        holder: the value that is there.
        absmax_known: whether the back end knows the largest absolute entry of every row.
        given: when it was last given out, in a section of a step.
    """

    __slots__ = ("absmax_known", "given", "holder", "number", "tensor")

    def __init__(self, tensor: Tensor, number: int = OWN) -> None:
        self.tensor = tensor
        self.number = number
        self.holder: Value | None = None
        self.absmax_known = False
        self.given = 0

    @property
    def taken(self) -> bool:
        """Whether what is there must not be lost."""
        return self.holder is not None and self.holder.kept


class Value:
    """One tensor [B, *shape] of each of some stacks.

    Made by operations and by the step loop alone. Read it by :meth:`tensors`; write to it by
    operations, or by torch inside :meth:`.base.Operations.write`.

    Args:
        kept: of state, and of gradients that are needed once more: not to be written to or used up.
    """

    __slots__ = ("_places", "kept", "stacks")

    def __init__(
        self, stacks: Sequence[Stack], places: Sequence[Place], kept: bool = False
    ) -> None:
        self.stacks = list(stacks)
        self.kept = kept
        self._places = list(places)
        for place in self._places:
            place.holder = self

    def places(self) -> list[Place]:
        """
        Raises:
            RuntimeError: an operation has used the value up, or its memory serves another one.
        """
        for place in self._places:
            if place.holder is not self:
                raise RuntimeError(
                    "this value is gone: an operation used it up, or its memory was needed for "
                    "another one. Copy it before, or let the rule declare more work_buffers"
                )
        return self._places

    def writable(self) -> list[Place]:
        """
        Raises:
            RuntimeError: as :meth:`places`; or the value is kept.
        """
        if self.kept:
            raise RuntimeError(
                "this value is kept (state, or a gradient that the update needs): an operation "
                "that changes it or uses it up wants a copy"
            )
        return self.places()

    def tensors(self) -> list[Tensor]:
        """To be read; one of each stack, in their order."""
        return [place.tensor for place in self.places()]

    def pairs(self) -> Iterator[tuple[Stack, Tensor]]:
        return zip(self.stacks, self.tensors(), strict=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block its memory is given to nothing else, and nothing may use it up."""
        before, self.kept = self.kept, True
        try:
            yield
        finally:
            self.kept = before

    def became(self, places: Sequence[Place]) -> Value:
        """What an operation made of it, which has used it up; in ``places``."""
        for place in self._places:
            place.holder = None
        return Value(self.stacks, places)

    def over(self, other: Value) -> Value:
        """This value where it has a stack, and ``other`` elsewhere; uses both up."""
        mine = dict(zip([id(s) for s in self.stacks], self.writable(), strict=True))
        others = zip(other.stacks, other._places, strict=True)
        rest = [(stack, place) for stack, place in others if id(stack) not in mine]
        if any(place.holder is not other for _, place in rest):
            other.places()  # raises
        places = {id(stack): place for stack, place in rest} | mine
        return Value(other.stacks, [places[id(s)] for s in other.stacks])


def resolved(stack: Stack, mode: int | None) -> int | None:
    """A mode of a stack by its number from 0 on; negative ones count from the stack's last mode on.
    None where it has no such mode."""
    order = len(stack.shape)
    if mode is None or not -order <= mode < order:
        return None
    return mode % order


class ModeVectors:
    """One vector per mode of each of some stacks: tensors [B, d_i]."""

    __slots__ = ("stacks", "vectors")

    def __init__(self, stacks: Sequence[Stack], vectors: Sequence[Sequence[Tensor]]) -> None:
        self.stacks = list(stacks)
        self.vectors = [list(mine) for mine in vectors]

    def map(self, function: Callable[[Tensor], Tensor]) -> ModeVectors:
        """function(vectors [B, d_i]) of every mode and stack, which must leave them as they are."""
        return ModeVectors(self.stacks, [[function(v) for v in mine] for mine in self.vectors])

    def of(self, stacks: Sequence[Stack]) -> list[list[Tensor]]:
        """Those of some of the stacks."""
        if len(stacks) == len(self.stacks) and all(map(operator.is_, stacks, self.stacks)):
            return self.vectors
        known = dict(zip(map(id, self.stacks), self.vectors, strict=True))
        return [known[id(s)] for s in stacks]

    def mode(self, mode: int) -> list[Tensor | None]:
        """Those of one mode, None for stacks that have not so many."""
        return [mine[mode] if mode < len(mine) else None for mine in self.vectors]


@dataclass(frozen=True)
class Operators:
    """The stacks' eigenbases, or what a rule keeps in their place (``Rule.operator``).

    orthogonal: False where they are no bases, such as inverse roots.
    """

    orthogonal: bool = True


class State:
    """What a rule keeps of some stacks, and their bases.

    ``s["exp_avg"]`` is a :class:`Value`, ``s.vectors("eigenvalues")`` are :class:`ModeVectors`;
    which there are, the rule declares. State is written by operations alone.
    """

    __slots__ = ("_values", "bases", "stacks")

    def __init__(self, stacks: Sequence[Stack], orthogonal: bool = True) -> None:
        self.stacks = list(stacks)
        self.bases = Operators(orthogonal)
        self._values: dict[str, Value] = {}

    def __getitem__(self, name: str) -> Value:
        if name not in self._values:
            places = [Place(s.state[name]) for s in self.stacks]
            self._values[name] = Value(self.stacks, places, kept=True)
        return self._values[name]

    def vectors(self, name: str) -> ModeVectors:
        return ModeVectors(self.stacks, [s.vectors[name] for s in self.stacks])

    @property
    def modes(self) -> range:
        """Numbers of modes; stacks of a lower order have no part in what is done in the last."""
        return range(max((len(s.shape) for s in self.stacks), default=0))

    @property
    def roots(self) -> Operators:
        """:attr:`bases` by the name that suits operators which are roots."""
        return self.bases


class Hyper(NamedTuple):
    """Hyperparameters of one step, the paper's symbols beside."""

    lr: float | Tensor  # alpha_t
    beta1: float
    beta2: float
    eps: float  # epsilon
    weight_decay: float  # lambda
    nadam: bool  # numerator beta1 M + (1 - beta1) G instead of M
    matmul_precision: str  # of rotations; statistics are float32-accurate under every setting
    # id(stack) -> 1 - beta1^t and 1 - beta_d^t of its rows as tensors [B, 1, ..., 1] on the device,
    # always the same ones; None: the stack's own numbers.
    corrections: Mapping[int, tuple[Tensor, Tensor]] | None = None
    skip: bool = False  # whether gradients that are not finite are left out
    noise_level: float = 0.0  # see :mod:`..noise`; 0: nothing is left out
    # sum of squares of all gradients of the group, where the host knows it, on a CPU
    gradient_square: float = math.inf
    beta3: float | None = None  # of D, where it is not beta2

    @property
    def beta_d(self) -> float:
        """Of second moments shaped like the blocks: D."""
        return self.beta2 if self.beta3 is None else self.beta3


def bias_corrections(stack: Stack, h: Hyper) -> tuple[float | Tensor, float | Tensor]:
    """1 - beta1^t and 1 - beta_d^t: numbers, or [B, 1, ..., 1] each."""
    if h.corrections is not None:
        return h.corrections[id(stack)]
    if stack.uniform:
        t = stack.steps[0]
        return 1 - h.beta1**t, 1 - h.beta_d**t
    return stack.bias_correction(h.beta1), stack.bias_correction(h.beta_d)
