"""Gradients on which implementations can be compared number by number, from a seed.

Comparing optimizers that decompose their statistics needs statistics whose eigenvectors are
unique: of full rank and with well-separated eigenvalues. Every other sequence makes null-space
eigenvectors, which are arbitrary, part of the result. Drawn with Python's own generator, whose
sequences do not depend on torch's version or on the device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

RATIO = 0.6  # of neighbouring singular values
ANGLE = 0.05  # radians a step by which neighbouring columns turn


def gaussian(shape: Sequence[int], draw: random.Random) -> Tensor:
    """Standard normal entries, float64."""
    count = math.prod(shape)
    values = [draw.gauss(0.0, 1.0) for _ in range(count)]
    return torch.tensor(values, dtype=torch.float64).reshape(tuple(shape))


def orthogonal(d: int, draw: random.Random) -> Tensor:
    """Q of the QR decomposition of a Gaussian matrix, with the signs that make R's diagonal
    positive."""
    q, r = torch.linalg.qr(gaussian((d, d), draw))
    return q * torch.sign(torch.diag(r))


def turned(q: Tensor, angle: float) -> Tensor:
    """q with its columns 2i and 2i + 1 turned by ``angle`` within their plane."""
    out = q.clone()
    for i in range(0, q.shape[1] - 1, 2):
        out[:, i] = math.cos(angle) * q[:, i] - math.sin(angle) * q[:, i + 1]
        out[:, i + 1] = math.sin(angle) * q[:, i] + math.cos(angle) * q[:, i + 1]
    return out


def start(shape: Sequence[int], seed: int) -> Tensor:
    """The parameter to begin with. float64"""
    return gaussian(shape, random.Random(f"start {seed}"))


def gradients(
    shape: Sequence[int], steps: int, seed: int, scale: float = 1.0, angle: float = ANGLE
) -> Iterator[Tensor]:
    """G_t: white noise times, per mode, U_t diag(RATIO^j), with U_t turning. float64"""
    draw = random.Random(f"gradients {seed}")
    bases = [orthogonal(d, draw) for d in shape]
    for t in range(steps):
        g = scale * gaussian(shape, draw)
        for mode, q in enumerate(bases):
            spectrum = RATIO ** torch.arange(q.shape[0], dtype=torch.float64)
            u = turned(q, t * angle) * spectrum
            g = torch.tensordot(u, g, dims=([1], [mode])).movedim(0, mode)
        yield g.contiguous()


def neighbours(gradients: Iterable[Tensor], seed: int) -> Iterator[Tensor]:
    """The gradients in float32 with every entry moved to the next number, up or down by chance.
    float64"""
    draw = random.Random(f"neighbours {seed}")
    for g in gradients:
        ways = torch.tensor([draw.choice((-math.inf, math.inf)) for _ in range(g.numel())])
        near = torch.nextafter(g.to(torch.float32), ways.view(g.shape).to(torch.float32))
        yield near.to(torch.float64)
