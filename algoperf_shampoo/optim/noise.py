"""Coordinates in an eigenbasis that hold nothing but rounding take no step.

Where the factors have no full rank, float32 leaves rounding in M~ and D in the place of zeros, and
M~ / sqrt(D) of two roundings is of order one. A coordinate is left out of a step if neither its
moment nor its D stands above the rounding of this step's own rotation,

    |M~_i| / (1 - beta1^t) <= k S   and   sqrt(D_i / (1 - beta2^t)) <= k S,

S^2 = Tr(L) / (1 - beta2^t) being the average of ||G||^2, and k = ``noise_level`` eps_machine; with
rotations of 11 bits (``matmul_precision`` "high" on a GPU) k is larger by noise_level / 4 * 2^-11 /
sqrt(entries): what rounded inputs leave is spread over all coordinates. The eigenvalues of the last
refresh have no say: a gradient that reaches a direction which was null then stands far above. With
an average of its own for D (beta3) 1 - beta3^t stands in both places, which in the first steps puts
S off by the root of the ratio of the two.

Measured in units of eps_machine S: rounding is 0.1 to 1 under random gradients, up to 15 under a
constant one. Coordinates of the minis in training stand above 256, but for OGBG's, of which 1% to
4% are dead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .blocks.layout import Stack

if TYPE_CHECKING:
    from .ops import Hyper

POLICIES = ("drop", "keep")
ROUNDED = 2.0**-11 / 4  # of inputs of 11 bits, beside eps_machine


def levels(h: Hyper, dtype: torch.dtype, on_gpu: bool) -> tuple[float, float]:
    """k of a block as two numbers: k = first + second / sqrt(entries)."""
    rounded = ROUNDED if on_gpu and h.matmul_precision == "high" else 0.0
    return h.noise_level * torch.finfo(dtype).eps, h.noise_level * rounded


def square(stack: Stack, h: Hyper) -> float:
    """k^2 of the stack's blocks."""
    first, second = levels(h, stack.dtype, stack.device.type != "cpu")
    return (first + second / (stack.numel / len(stack)) ** 0.5) ** 2


def diagonal(stack: Stack) -> Tensor:
    """The diagonal of each block's smallest factor, [B, d]; all factors have the same trace."""
    mode = min(range(len(stack.shape)), key=lambda i: stack.shape[i])
    return stack.factors[mode].diagonal(dim1=-2, dim2=-1)


def of(
    stack: Stack,
    m: Tensor,
    v: Tensor,
    traces: Tensor,
    c1: float | Tensor,
    c2: float | Tensor,
    h: Hyper,
) -> Tensor:
    """Which coordinates are noise: bool [B, *shape].

    m, v: M~ and D in the basis, [B, *shape]; traces: of the factors, [B]; c1, c2: the bias
    corrections, numbers or [B, 1, ..., 1].
    """
    limit = stack.per_row(traces * square(stack, h))
    return (v < limit) & (m * m < limit * (c1 * c1 / c2))


class Watch:
    """Which stacks may have a coordinate that is noise; on a CPU, where looking costs something.

    D falls by no more than beta2 a step, so the smallest entry of D at one look says up to which
    trace no coordinate of the row is noise at later steps: a limit that falls by beta2 a step. The
    trace becomes beta2 trace + (1 - beta2) ||G||^2, so the distance between the two falls by beta2
    and by (1 - beta2) ||G||^2, which is no more than that of all gradients. Until that may have
    used the distance up, nothing is looked at. The outcome is the same as if all were.

    Args:
        seconds: D of each stack.
    """

    def __init__(self, stacks: Sequence[Stack], seconds: Sequence[Tensor]) -> None:
        self._stacks, self._seconds = list(stacks), list(seconds)
        self._diagonals = [diagonal(s) for s in stacks]
        self._traces = [s.factors[0].new_zeros(len(s)) for s in stacks]
        self._settings: object = None
        self.forget()

    def forget(self) -> None:
        """D has been replaced."""
        # What the gradients may have added to a trace, and per stack up to where that does no harm.
        self._added = 0.0
        self._harmless = [0.0] * len(self._stacks)

    def noisy(self, h: Hyper) -> list[tuple[int, Tensor]]:
        """(number, traces) of the stacks that may have such coordinates in this step."""
        # With a beta of its own, D and the traces move at different rates: always looked at.
        if self._settings != (settings := (h.noise_level, h.beta2)) or h.beta3 is not None:
            self._settings = settings
            self.forget()
        # A little more, for what rounds on the way.
        self._added = h.beta2 * self._added + 1.01 * (1 - h.beta2) * h.gradient_square
        if not math.isfinite(self._added):
            self.forget()
        found = []
        for number, stack in enumerate(self._stacks):
            self._harmless[number] *= h.beta2
            if self._added < self._harmless[number]:
                continue
            traces = torch.sum(self._diagonals[number], 1, out=self._traces[number])
            least = self._seconds[number].flatten(1).amin(1)
            distance = float(least.mul_(0.99 / square(stack, h)).sub_(traces).amin())
            if distance > 0:
                self._harmless[number] = self._added + distance
            else:
                self._harmless[number] = 0.0
                found.append((number, traces))
        return found
