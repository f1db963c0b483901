"""From parameter shapes to blocks: merge small dimensions, then cut what is still too large.

The order of merging is part of the algorithm's definition: the AlgoPerf submission merges from
left to right, so [32, 32, 3, 3] becomes [1024, 9] (from the right it would be [32, 288]).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

# What a parameter of two or more dimensions with at most max_preconditioner_dim entries becomes.
SMALL_MATRICES = ("vector", "matrix")


def merge_dims(shape: tuple[int, ...], max_dim: int) -> tuple[int, ...]:
    """Drop dimensions of size 1, then multiply neighbours, left to right, while <= ``max_dim``.

    >>> merge_dims((384, 3, 16, 16), 1024), merge_dims((512, 512, 3, 3), 1024)
    ((384, 768), (512, 512, 9))

    Returns at least one dimension; (1,) for a scalar.
    """
    sizes = [d for d in shape if d != 1]
    merged: list[int] = []
    for d in sizes:
        if merged and merged[-1] * d <= max_dim:
            merged[-1] *= d
        else:
            merged.append(d)
    return tuple(merged) or (1,)


@dataclass(frozen=True)
class Block:
    """A rectangular piece of one merged parameter.

    ``start[i] : start[i] + shape[i]`` along every dimension i of ``merged``.
    """

    merged: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(s, s + d) for s, d in zip(self.start, self.shape, strict=True))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def cut(shape: tuple[int, ...], max_dim: int, small_matrices: str = "vector") -> list[Block]:
    """Blocks of a parameter of ``shape``, in row-major order of the grid of blocks.

    A dimension d is cut into floor(d / max_dim) pieces of max_dim and one of the rest.

    Args:
        small_matrices: where merging leaves one dimension of several, that vector (the paper's
            footnote 8), or with "matrix" the first dimension by the product of the others:
            [8, 4, 3, 3] becomes 288, or 8 x 36.

    Raises:
        ValueError: a dimension is 0, or max_dim < 1.
    """
    if max_dim < 1:
        raise ValueError(f"max_preconditioner_dim must be at least 1, got {max_dim}")
    if 0 in shape:
        raise ValueError(f"cannot precondition an empty parameter of shape {tuple(shape)}")
    merged = merge_dims(tuple(shape), max_dim)
    sizes = [d for d in shape if d != 1]
    if small_matrices == "matrix" and len(merged) == 1 < len(sizes):
        merged = (sizes[0], math.prod(sizes[1:]))
    pieces = [[(s, min(max_dim, d - s)) for s in range(0, d, max_dim)] for d in merged]
    return [
        Block(merged, tuple(s for s, _ in corner), tuple(d for _, d in corner))
        for corner in itertools.product(*pieces)
    ]


def runs(block: Block) -> Iterable[tuple[int, int, int, int, int]]:
    """A block as pieces of its parameter: (offset in the parameter, offset in the block, run,
    stride, entries), each being runs of ``run`` consecutive entries every ``stride``."""
    strides = [1] * len(block.merged)
    for i in range(len(strides) - 2, -1, -1):
        strides[i] = strides[i + 1] * block.merged[i + 1]
    run, i = 1, len(block.shape) - 1
    while i > 0 and block.shape[i] == block.merged[i]:  # whole dimensions at the end
        run *= block.shape[i]
        i -= 1
    run *= block.shape[i]
    rows = block.shape[i - 1] if i else 1
    stride = strides[i - 1] if i else run
    origin = sum(s * d for s, d in zip(block.start, strides, strict=True))
    outer = itertools.product(*(range(d) for d in block.shape[: max(i - 1, 0)]))
    for number, index in enumerate(outer):
        offset = origin + sum(k * d for k, d in zip(index, strides, strict=False))
        yield offset, number * rows * run, run, stride, rows * run
