"""Hyperparameters of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from ..blocks.layout import Stack


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
    noise_level: float = 0.0  # see :mod:`..noise`; 0: nothing is left out
    # sum of squares of all gradients of the group, where the host knows it, on a CPU
    gradient_square: float = math.inf


def bias_corrections(stack: Stack, h: Hyper) -> tuple[float | Tensor, float | Tensor]:
    """1 - beta1^t and 1 - beta2^t: numbers, or [B, 1, ..., 1] each."""
    if h.corrections is not None:
        return h.corrections[id(stack)]
    return stack.bias_correction(h.beta1), stack.bias_correction(h.beta2)
