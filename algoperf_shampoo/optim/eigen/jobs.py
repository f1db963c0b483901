"""What is to be decomposed, what comes back, and rows of stacks by index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Job:
    """Matrices to decompose: operators[indices] receive the eigenvectors of factors[indices].

    factors, operators: [N, n, n], contiguous. On entry operators[indices] are the old eigenvectors
    (columns by ascending eigenvalue): the start of method "warm", memory to work in for "eigh".
    """

    factors: Tensor
    operators: Tensor
    indices: list[int]

    @property
    def n(self) -> int:
        return self.factors.shape[-1]

    def part(self, positions: Sequence[int]) -> Job:
        """Those at ``positions`` of the indices."""
        return Job(self.factors, self.operators, [self.indices[p] for p in positions])


@dataclass(frozen=True)
class Result:
    """values: [len(indices), n], in the order of the columns; converged: per index. Where it is
    False the operator may be anything. permutation: [len(indices), n] int64, where a method has
    permuted the old columns before it turned them: which of them stands where."""

    values: Tensor
    converged: list[bool]
    permutation: Tensor | None = None

    @staticmethod
    def empty(job: Job) -> Result:
        """To be filled: values not set yet, and all converged."""
        values = job.factors.new_empty(len(job.indices), job.n)
        return Result(values, [True] * len(job.indices))

    def put(self, positions: Sequence[int], part: Result) -> None:
        """The part's values and convergence at ``positions``."""
        put(self.values, positions, part.values)
        for p, ok in zip(positions, part.converged, strict=True):
            self.converged[p] = ok


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
