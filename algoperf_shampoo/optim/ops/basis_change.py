"""What a rule sees of a refresh: a basis that changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..blocks.layout import Stack
from ..blocks.rows import put, take
from . import linalg
from .base import Operations
from .linalg import matmul_precision
from .values import Value


@dataclass
class BasisChange:
    """New operators for some rows of one mode of one stack.

    Attributes:
        rows: which; those whose decomposition failed keep their operator.
        eigenvalues: of the factors, [len(rows), d] in the order of the new columns; permutation
            [len(rows), d]: new column j was, before it was turned, old column permutation[j]; None
            where the solver has not permuted any. Known once the new operators stand.
        beta2: of the factors.
        first: whether these are the rows' first operators, of a rule that ``starts``.
        converged: per row, whether it has a new operator; likewise.
    """

    stack: Stack
    mode: int
    rows: list[int]
    ops: Operations
    beta2: float
    first: bool = False
    converged: list[bool] = field(default_factory=list)
    find_eigenvalues: Callable[[], Tensor] | None = None
    find_permutation: Callable[[], Tensor | None] | None = None

    @property
    def eigenvalues(self) -> Tensor:
        assert self.find_eigenvalues is not None, "known after the yield"
        return self.find_eigenvalues()

    @property
    def permutation(self) -> Tensor | None:
        assert self.find_permutation is not None, "known after the yield"
        return self.find_permutation()

    @property
    def corrections(self) -> Tensor:
        """1 - beta2^t of the rows, [len(rows)]."""
        stack = self.stack
        values = [1 - self.beta2 ** stack.steps[r] for r in self.rows]
        return torch.tensor(values, dtype=torch.float64).to(stack.dtype).to(stack.device)

    def leave(self, x: Value) -> None:
        """Coordinates x, state of the stack, become those without this mode's basis: x <- Q x."""
        self._rotate(x, back=True)

    def enter(self, x: Value) -> None:
        """x <- Q'x, the inverse of :meth:`leave`."""
        self._rotate(x, back=False)

    def permute(self, x: Value) -> None:
        """Entries along the mode follow their columns."""
        permutation = self.permutation
        if permutation is not None:
            (tensor,) = x.tensors()
            self._gather(tensor, permutation, self.mode + 1)

    def old_operators(self) -> Tensor:
        """A copy of the operators as they stand, [len(rows), d, d]; before the yield."""
        operators = self.stack.operators[self.mode]
        return self.ops.once(lambda: take(operators, self.rows).clone())

    def mix(self, x: Value, old: Tensor) -> None:
        """x <- (R o R) x along the mode, R = Q_new' Q_old (Eq. 27): what moments of squares in the
        old basis say of those in the new one. old: the rows' :meth:`old_operators`."""
        (tensor,) = x.tensors()
        self.ops.once(self._mix, tensor, old)

    def _mix(self, tensor: Tensor, old: Tensor) -> None:
        with matmul_precision("highest"):
            turned = take(self.stack.operators[self.mode], self.rows).mT @ old
            mixed = linalg.rotate_mode(take(tensor, self.rows), turned.square().mT, self.mode)
            put(tensor, self.rows, mixed)

    def permute_vector(self, vector: Tensor) -> None:
        """:meth:`permute` for the mode's vectors [B, d]."""
        permutation = self.permutation
        if permutation is not None:
            self._gather(vector, permutation, 1)

    def assign_vector(self, vector: Tensor, values: Tensor) -> None:
        """Vectors [B, d] of the rows that converged <- values [len(rows), d]."""
        good = [p for p, ok in enumerate(self.converged) if ok]
        if good:
            self.ops.once(put, vector, [self.rows[p] for p in good], take(values, good))

    def _rotate(self, x: Value, back: bool) -> None:
        (tensor,) = x.tensors()
        operation = self.ops.rotate_mode_
        self.ops.once(operation, self.stack, tensor, self.mode, self.rows, back)

    def _gather(self, tensor: Tensor, permutation: Tensor, dim: int) -> None:
        part = take(tensor, self.rows)
        shape = [len(part), *(-1 if i == dim else 1 for i in range(1, part.ndim))]
        index = permutation.view(shape).expand_as(part)
        self.ops.once(put, tensor, self.rows, torch.gather(part, dim, index))
