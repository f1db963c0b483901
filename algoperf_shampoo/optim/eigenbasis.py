"""When an eigenbasis is refreshed, and the refresh: all factors of one size at a time.

Factors of one size stand in one stack [N, n, n] across parameters, blocks and modes; the stacks of
:mod:`.buckets` hold slices of it. So the criterion of all factors is a handful of batched products
and one host read, and a refresh gathers just those that fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .arithmetic import Arithmetic
from .buckets import Lent, Stack
from .eigen.jobs import Job, Result, put, take
from .eigen.solvers import Solver
from .gpu.graphs import Run, direct
from .linalg import largest_entry, relative_off_diagonal
from .precision import matmul_precision
from .preconditioners.base import Rule

# Criterion and bookkeeping work on pieces of at most this many matrix entries (32 MiB in float32),
# so that a refresh takes bounded memory whatever the model.
CHUNK_ENTRIES = 2**23


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


def build_factor_sets(stacks: Sequence[Stack]) -> list[FactorSet]:
    """Allocate factors (zero) and operators (identity) of the stacks, and set their slices."""
    modes: dict[tuple[int, torch.dtype, torch.device], list[tuple[Stack, int]]] = {}
    for stack in stacks:
        for mode, n in enumerate(stack.shape):
            modes.setdefault((n, stack.dtype, stack.device), []).append((stack, mode))
        stack.factors = [torch.empty(0)] * len(stack.shape)
        stack.operators = [torch.empty(0)] * len(stack.shape)
    sets = []
    for (n, dtype, device), users in modes.items():
        total = sum(len(stack) for stack, _ in users)
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


def chunks(indices: Sequence[int], n: int) -> Iterable[list[int]]:
    """Pieces of ``indices`` whose n x n matrices together stay within CHUNK_ENTRIES."""
    size = max(1, CHUNK_ENTRIES // (n * n))
    for start in range(0, len(indices), size):
        yield list(indices[start : start + size])


@torch.no_grad()
def scores(factor_set: FactorSet, indices: Sequence[int], tau: float) -> Tensor:
    """Per factor, a number that exceeds tau when it needs a new operator: [len(indices)], float64.

    With tau > 0 the left side of Eq. 11. With tau = 0 (fixed frequency) infinity. Never for a
    factor that is all zero (no direction to prefer) or not finite (nan compares false).
    """
    parts = []
    for chunk in chunks(indices, factor_set.n):
        a = take(factor_set.factors, chunk)
        if tau > 0:
            with matmul_precision("highest"):
                part = relative_off_diagonal(a, take(factor_set.operators, chunk))
        else:
            top = largest_entry(a)
            part = torch.where(top > 0, top + math.inf, top)
            part = torch.where(torch.isfinite(top), part, torch.full_like(part, math.nan))
        parts.append(part.double())
    return torch.cat(parts)


@torch.no_grad()
def refresh(
    factor_sets: Sequence[FactorSet],
    rows: Mapping[int, Sequence[int]],
    rule: Rule,
    beta2: float,
    tau: float,
    solver: Solver,
    arithmetic: Arithmetic,
    lent: Sequence[Lent] = (),
    group: dist.ProcessGroup | None = None,
    run: Run = direct,
) -> bool:
    """Check the factors of the rows that are due, and give those that fail a new operator.

    Args:
        rows: id(stack) -> rows due now (t mod F = 0).
        arithmetic: with which the rule takes what it keeps from one basis to the other.
        group: with replicas in a process group, rank 0's decision is broadcast, so that replicas
            cannot part over rounding near the threshold.
        lent: memory to work in; its free part is overwritten if the result is True.
        run: may record the check of all factors as a graph, see :mod:`.graphs`.

    Returns:
        Whether any operator is new.
    """
    due = [(s, indices) for s in factor_sets if (indices := s.due(rows))]
    if not due:
        return False
    device = max((s.factors.device for s, _ in due), key=str)
    everything = sum(len(i) for _, i in due) == sum(len(s.factors) for s in factor_sets)
    values = (run if everything else direct)(
        "scores" if tau > 0 else "finite",
        lambda: torch.cat([scores(s, i, tau).to(device) for s, i in due]),
    )
    if group is not None:
        dist.broadcast(values, src=dist.get_global_rank(group, 0), group=group)
    read = values.tolist()  # the one host read
    position = 0
    jobs: list[tuple[FactorSet, Job]] = []
    for factor_set, indices in due:
        score = read[position : position + len(indices)]
        position += len(indices)
        failing = []
        for i, s in zip(indices, score, strict=True):
            factor_set.checks[i] += 1
            if s > tau:
                failing.append(i)
            elif math.isnan(s):
                factor_set.failures[i] += 1
        if failing:
            jobs.append((factor_set, Job(factor_set.factors, factor_set.operators, failing)))
    if not jobs:
        return False
    for factor_set, job in jobs:
        _move(factor_set, job.indices, rule.leave, arithmetic)
    results = solver.solve([job for _, job in jobs], tau, lent)
    for (factor_set, job), result in zip(jobs, results, strict=True):
        _finish(factor_set, job.indices, result, rule, beta2)
        _move(factor_set, job.indices, rule.enter, arithmetic)
    return True


def _move(
    factor_set: FactorSet,
    indices: Sequence[int],
    hook: Callable[[Stack, int, list[int], Arithmetic], None],
    arithmetic: Arithmetic,
) -> None:
    """Call a rule's leave or enter hook for all blocks whose factors are among ``indices``."""
    for span, rows, _ in factor_set.spans_of(indices):
        hook(span.stack, span.mode, rows, arithmetic)


def _finish(
    factor_set: FactorSet, indices: Sequence[int], result: Result, rule: Rule, beta2: float
) -> None:
    """Count, mark rows as ready, and turn eigenvectors into the rule's operators."""
    for i, ok in zip(indices, result.converged, strict=True):
        factor_set.refreshes[i] += ok
        factor_set.failures[i] += not ok
    order, correction = [0] * len(indices), [0.0] * len(indices)
    for span, rows, positions in factor_set.spans_of(indices):
        for r, p in zip(rows, positions, strict=True):
            order[p] = len(span.stack.shape)
            correction[p] = 1 - beta2 ** span.stack.steps[r]
            span.stack.ready[r] = True
    position = 0
    for chunk in chunks(indices, factor_set.n):
        part = slice(position, position + len(chunk))
        position += len(chunk)
        values = result.values[part]
        vectors = take(factor_set.operators, chunk)
        new = rule.operator(
            values, vectors, values.new_tensor(order[part]), values.new_tensor(correction[part])
        )
        if new is not vectors:
            put(factor_set.operators, chunk, new)
