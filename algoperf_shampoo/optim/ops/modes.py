"""Operations on vectors of modes, such as KL-Shampoo's eigenvalues, by plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks.layout import Stack
from ..journal import Once
from .values import ModeVectors, Value

# Of the size of a mode: what lambda^-1/2 is not to exceed.
Limit = Callable[[int], float]


class ModeOperations:
    """The part of :class:`.base.Operations` that vectors of modes have a say in."""

    once: Once

    def inverse_sqrt(self, vectors: ModeVectors, limit: Limit) -> ModeVectors:
        """lambda^-1/2 of all entries lambda [B, d] of state, at most limit(d); 0 where lambda is 0.

        The result holds until it is asked for again: whoever changes lambda has the old one.
        """
        return self.once(lambda: vectors.map(lambda lam: inverse_sqrt(lam, limit(lam.shape[-1]))))

    def mean_square_ema(
        self, vectors: ModeVectors, x: Value, beta: float, scale: ModeVectors, limit: Limit
    ) -> None:
        """lambda <- beta lambda + (1 - beta) mean of x^2, per entry of every mode, x being scaled
        in all other modes first (x stays as it is); then lambda^-1/2 is brought down to limit(d).

        Vectors of rows that are bad stay as they are.
        """
        xs, scales = x.tensors(), scale.of(x.stacks)

        def renewed() -> list[list[Tensor]]:
            return [
                [
                    clamped(beta * lam + (1 - beta) * mean_square(y, s, i), limit(lam.shape[-1]))
                    for i, lam in enumerate(mine)
                ]
                for y, s, mine in zip(xs, scales, vectors.of(x.stacks), strict=True)
            ]

        # Once, before any of them is written.
        new = self.once(renewed)
        for stack, mine, values in zip(x.stacks, vectors.of(x.stacks), new, strict=True):
            for old, value in zip(mine, values, strict=True):
                self.once(old.copy_, value if stack.bad is None else kept_rows(stack, old, value))

    def ema(self, state: Value, x: Value, beta: float, square: bool = False) -> None:
        raise NotImplementedError

    def momentum(
        self,
        x: Value,
        m: Value,
        beta: float,
        scale: ModeVectors,
        eps: float,
        factor: Any,
    ) -> None:
        """The moment m learns x, and x becomes factor m / (1 / s + eps), s the product of the
        entries of ``scale`` in all modes: m / (sqrt(lambda) + eps) of s = lambda^-1/2.

        factor: a number, or a tensor [] on the device.
        """
        self.ema(m, x, beta)
        for place, old, mine in zip(x.writable(), m.tensors(), scale.of(x.stacks), strict=True):
            y = place.tensor
            s = scaled(torch.ones_like(y), mine, None)
            y.copy_(old).mul_(s).div_(s.mul_(eps).add_(1)).mul_(factor)
            place.absmax_known = False


def inverse_sqrt(lam: Tensor, limit: float) -> Tensor:
    """lambda^-1/2, at most ``limit``; 0 where lambda is 0. [B, d]"""
    least = torch.finfo(lam.dtype).tiny
    return torch.where(lam > 0, lam.clamp_min(least).rsqrt(), 0.0).clamp(max=limit)


def clamped(lam: Tensor, limit: float) -> Tensor:
    """lambda whose :func:`inverse_sqrt` is at most ``limit`` of itself. [B, d]"""
    root = inverse_sqrt(lam, limit)
    return torch.where(root > 0, root.clamp_min(torch.finfo(lam.dtype).tiny) ** -2, 0.0)


def mean_square(x: Tensor, scale: Sequence[Tensor] | None, mode: int) -> Tensor:
    """Mean of x^2 [B, *shape] over all modes but one, x scaled in those first: [B, d_mode]."""
    y = x if scale is None else scaled(x, scale, mode)
    rows = y.movedim(mode + 1, 1).reshape(len(x), x.shape[mode + 1], -1)
    return rows.square().mean(2)


def scaled(x: Tensor, vectors: Sequence[Tensor], skip: int | None) -> Tensor:
    """x [B, *shape] times vectors[i][j] for entry j of every mode i but ``skip``."""
    for mode, vector in enumerate(vectors):
        if mode != skip:
            shape = [len(x), *(-1 if i == mode else 1 for i in range(x.ndim - 1))]
            x = x * vector.view(shape)
    return x


def kept_rows(stack: Stack, old: Tensor, new: Tensor) -> Tensor:
    """new, but the old of rows whose gradient is bad. [B, ...]"""
    assert stack.bad is not None
    return torch.where((stack.bad != 0).view(-1, *[1] * (old.ndim - 1)), old, new)
