"""What is to be decomposed, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ..blocks.rows import put


@dataclass(frozen=True)
class Problem:
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

    def part(self, positions: Sequence[int]) -> Problem:
        """Those at ``positions`` of the indices."""
        return Problem(self.factors, self.operators, [self.indices[p] for p in positions])


@dataclass(frozen=True)
class Result:
    """values: [len(indices), n], in the order of the columns; converged: per index. Where it is
    False the operator may be anything. permutation: [len(indices), n] int64, where a method has
    permuted the old columns before it turned them: which of them stands where."""

    values: Tensor
    converged: list[bool]
    permutation: Tensor | None = None

    @staticmethod
    def empty(problem: Problem) -> Result:
        """To be filled: values not set yet, and all converged."""
        values = problem.factors.new_empty(len(problem.indices), problem.n)
        return Result(values, [True] * len(problem.indices))

    def put(self, positions: Sequence[int], part: Result) -> None:
        """The part's values and convergence at ``positions``."""
        put(self.values, positions, part.values)
        for p, ok in zip(positions, part.converged, strict=True):
            self.converged[p] = ok
