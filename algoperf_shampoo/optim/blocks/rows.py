"""Rows of stacks by index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Criterion, checks and bookkeeping work on pieces of at most this many matrix entries (32 MiB in
# float32), so that a refresh takes bounded memory whatever the model.
CHUNK_ENTRIES = 2**23


def chunks(indices: Sequence[int], n: int) -> Iterable[list[int]]:
    """Pieces of ``indices`` whose n x n matrices together stay within CHUNK_ENTRIES."""
    size = max(1, CHUNK_ENTRIES // (n * n))
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


def consecutive(indices: Sequence[int]) -> bool:
    """Whether they are first, first + 1, ..."""
    first, count = indices[0], len(indices)
    return indices[-1] == first + count - 1 and list(indices) == list(range(first, first + count))


def runs(indices: Sequence[int]) -> list[slice]:
    """The longest stretches of consecutive indices, in order."""
    found: list[slice] = []
    for i in indices:
        if found and found[-1].stop == i:
            found[-1] = slice(found[-1].start, i + 1)
        else:
            found.append(slice(i, i + 1))
    return found


def longest_run(indices: Sequence[int]) -> tuple[int, int]:
    """(first, count) of the longest run of consecutive indices, the earliest of equal ones."""
    best = max(runs(indices), key=lambda run: run.stop - run.start)
    return best.start, best.stop - best.start


def take(x: Tensor, indices: Sequence[int]) -> Tensor:
    """x[indices] along the first dimension: a view when they are consecutive, else a copy."""
    if consecutive(indices):
        return x[indices[0] : indices[0] + len(indices)]
    return x[torch.tensor(indices, device=x.device)]


def put(x: Tensor, indices: Sequence[int], value: Tensor) -> None:
    """x[indices] = value along the first dimension; value is other memory than x."""
    if consecutive(indices):
        x[indices[0] : indices[0] + len(indices)].copy_(value)
    else:
        x.index_copy_(0, torch.tensor(indices, device=x.device), value)
