"""Gradients for benchmarks: decaying spectra whose eigenvectors turn slowly, from a seed.

A gradient of shape [m, n] is U_t diag(s) Z_t diag(r) V_t' with Z_t white, s_i = i^-decay (the same
for r), and U_t, V_t orthogonal matrices that turn by a fixed angle per step within pairs of their
columns. So E[G G'] has eigenvectors U_t and a power-law spectrum, as gradients of trained networks
do, and a basis that was right at one check is a little wrong at the next. 1-D parameters: U_t
diag(s) z.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from algoperf_shampoo.optim.blocks.partition import merge_dims


class TurningGradients:
    """Draws gradients for a list of parameters; the same seed gives the same sequence on a device.

    Args:
        params: whose shapes, dtypes and devices count.
        seed: of everything.
        decay: exponent of the power law of singular values.
        angle: radians by which pairs of eigenvectors turn per step.
        scale: root mean square of the entries.
    """

    def __init__(
        self,
        params: list[Tensor],
        seed: int = 0,
        decay: float = 1.0,
        angle: float = 0.002,
        scale: float = 1e-3,
    ) -> None:
        self.params = params
        self.decay, self.angle, self.scale = decay, angle, scale
        device = params[0].device
        self.generator = torch.Generator(device).manual_seed(seed)
        self.t = 0
        # Parameters of one shape are drawn together, each with its own bases.
        self.groups: dict[tuple[int, ...], list[int]] = {}
        for i, p in enumerate(params):
            self.groups.setdefault(tuple(p.shape), []).append(i)
        self.bases: dict[tuple[tuple[int, ...], int], Tensor] = {}
        for shape, members in self.groups.items():
            for mode, d in enumerate(self._matrix(shape)):
                if d > 1:
                    x = torch.randn(len(members), d, d, device=device, generator=self.generator)
                    self.bases[shape, mode] = torch.linalg.qr(x).Q

    @staticmethod
    def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
        """Any shape as a vector or a matrix [first, rest]."""
        merged = merge_dims(shape, 1)  # drops dimensions of size 1
        return merged if len(merged) == 1 else (merged[0], math.prod(merged[1:]))

    def _turned(self, basis: Tensor) -> Tensor:
        """Columns 2i and 2i + 1 turned by t * angle within their plane."""
        c, s = math.cos(self.t * self.angle), math.sin(self.t * self.angle)
        even = basis.shape[-1] // 2 * 2
        out = basis.clone()
        a, b = basis[..., 0:even:2], basis[..., 1:even:2]
        out[..., 0:even:2] = c * a - s * b
        out[..., 1:even:2] = s * a + c * b
        return out

    def draw(self) -> list[Tensor]:
        """Gradients of the next step, in the order of the parameters."""
        gradients: list[Tensor | None] = [None] * len(self.params)
        self.t += 1
        for shape, members in self.groups.items():
            matrix = self._matrix(shape)
            device = self.params[members[0]].device
            x = torch.randn(len(members), *matrix, device=device, generator=self.generator)
            for mode, d in enumerate(matrix):
                if d == 1:
                    continue
                spectrum = torch.arange(1, d + 1, device=device, dtype=x.dtype) ** -self.decay
                spectrum *= math.sqrt(d) / spectrum.norm()
                u = self._turned(self.bases[shape, mode]) * spectrum
                x = torch.einsum("bij,bj...->bi...", u, x.movedim(mode + 1, 1)).movedim(1, mode + 1)
            for k, i in enumerate(members):
                p = self.params[i]
                gradients[i] = (self.scale * x[k]).reshape(p.shape).to(p.dtype).contiguous()
        return [g for g in gradients if g is not None]
