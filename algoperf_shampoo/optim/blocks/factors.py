"""The factors of all blocks: those of one size stand in one stack [N, n, n], across parameters,
blocks and modes; the stacks of :mod:`.layout` hold slices of it.

So the criterion of all factors is a handful of batched products and one host read, and a refresh
gathers just those that fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .layout import Stack


@dataclass(frozen=True)
class Span:
    """Rows start:stop of a factor set are mode ``mode`` of all rows of ``stack``."""

    stack: Stack
    mode: int
    start: int


@dataclass
class FactorSet:
    """All factors of one size n (and dtype and device).

    factors, operators: [N, n, n]; spans: whose they are; checks, refreshes, failures: per factor,
    how often it was due, got a new operator, or could not (not finite, or no back end converged).
    """

    n: int
    factors: Tensor
    operators: Tensor
    spans: list[Span]
    checks: list[int] = field(default_factory=list)
    refreshes: list[int] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)

    def due(self, rows: Mapping[int, Sequence[int]]) -> list[int]:
        """Indices of the factors of given rows; rows: id(stack) -> row numbers."""
        return [s.start + r for s in self.spans for r in rows.get(id(s.stack), ())]

    def spans_of(self, indices: Sequence[int]) -> Iterable[tuple[Span, list[int], list[int]]]:
        """(span, its rows among indices, their positions in indices)."""
        for span in self.spans:
            stop = span.start + len(span.stack)
            inside = [(i - span.start, p) for p, i in enumerate(indices) if span.start <= i < stop]
            if inside:
                yield span, [r for r, _ in inside], [p for _, p in inside]


def build_factor_sets(stacks: Sequence[Stack], elsewhere: bool = False) -> list[FactorSet]:
    """Allocate factors (zero) and operators (identity) of the stacks, and set their slices.

    elsewhere: they are another rank's: shapes without memory, on torch's meta device.
    """
    modes: dict[tuple[int, torch.dtype, torch.device], list[tuple[Stack, int]]] = {}
    for stack in stacks:
        for mode, n in enumerate(stack.shape):
            modes.setdefault((n, stack.dtype, stack.device), []).append((stack, mode))
        stack.factors = [torch.empty(0)] * len(stack.shape)
        stack.operators = [torch.empty(0)] * len(stack.shape)
    sets = []
    for (n, dtype, device), users in modes.items():
        total = sum(len(stack) for stack, _ in users)
        device = torch.device("meta") if elsewhere else device
        factors = torch.zeros(total, n, n, dtype=dtype, device=device)
        operators = torch.eye(n, dtype=dtype, device=device).repeat(total, 1, 1)
        spans, start = [], 0
        for stack, mode in users:
            stop = start + len(stack)
            stack.factors[mode] = factors[start:stop]
            stack.operators[mode] = operators[start:stop]
            spans.append(Span(stack, mode, start))
            start = stop
        sets.append(FactorSet(n, factors, operators, spans, *([0] * total for _ in range(3))))
    return sets
