"""The refresh of eigenbases: which factors are due, their decompositions, and what follows from
them, all factors of one size at a time (:mod:`.blocks.factors`)."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .blocks.factors import FactorSet
from .blocks.memory import BorrowedMemory
from .blocks.rows import CHUNK_ENTRIES, chunks, put, take
from .criterion import read_scores
from .eigen.host_offload import aside
from .eigen.problem import Problem, Result
from .eigen.solver import Solver
from .eigen.verify import sound
from .journal import Once, Run, directly_run
from .ops import BasisChange, Operations, State
from .ops.linalg import matmul_precision
from .rule import Rule
from .telemetry import Telemetry

log = logging.getLogger(__name__)


@torch.no_grad()
def refresh(
    factor_sets: Sequence[FactorSet],
    rows: Mapping[int, Sequence[int]],
    rule: Rule,
    beta2: float,
    tau: float,
    solver: Solver,
    ops: Operations,
    borrowed: Sequence[BorrowedMemory] = (),
    group: dist.ProcessGroup | None = None,
    run: Run = directly_run,
    mend: bool = True,
    first: bool = False,
    telemetry: Telemetry | None = None,
) -> bool:
    """Check the factors of the rows that are due, and give those that fail a new operator
    (Algorithm 2, lines 6 to 9).

    A factor whose decomposition fails, or is none (:mod:`.eigen.verify`), keeps its operator; one
    that is not finite does so too, and starts anew at zero where ``mend`` is set.

    Args:
        rows: id(stack) -> rows due now (t mod F = 0).
        ops: with which the rule takes what it keeps from one basis to the other; its
            ``once`` lets a refresh that failed half-way go on (:mod:`.journal`).
        group: with replicas in a process group, rank 0's decision is broadcast, so that replicas
            cannot part over rounding near the threshold.
        borrowed: memory to work in; its free part is overwritten if the result is True.
        run: may record the check of all factors as a graph, see :mod:`.graphs`.
        mend: whether factors that are not finite start anew.
        first: whether the rows start now (``Rule.starts``).
        telemetry: is told what is found.

    Returns:
        Whether memory that is borrowed was worked in.
    """
    once = ops.once
    due = [(s, indices) for s in factor_sets if (indices := s.due(rows))]
    if not due:
        return False
    read = iter(once(read_scores, factor_sets, due, tau, group, run))
    problems: list[tuple[FactorSet, Problem]] = []
    for factor_set, indices in due:
        score = {i: next(read) for i in indices}
        spoiled = [i for i, s in score.items() if math.isnan(s)]
        if telemetry is not None:
            once(telemetry.checked, factor_set, score, tau, rule.orthogonal)
        once(_count_checks, factor_set, indices, spoiled)
        if spoiled and mend:
            once(factor_set.factors.index_fill_, 0, _index(factor_set, spoiled), 0.0)
        if tau == 0 and rule.roots and (zero := [i for i, s in score.items() if s == 0]):
            once(_roots_of_zero, factor_set, zero, rule, beta2)
            if telemetry is not None:
                zeros = factor_set.factors.new_zeros(len(zero), factor_set.n)
                once(telemetry.decomposed, factor_set, zero, zeros)
        if rule.eigenvalues_at_checks and (good := [i for i, s in score.items() if s <= tau]):
            _keep(factor_set, good, rule, beta2, ops)
        if failing := [i for i, s in score.items() if s > tau]:  # line 6
            problems.append(
                (factor_set, Problem(factor_set.factors, factor_set.operators, failing))
            )
    if not problems:
        return False
    changes = [
        _changes(factor_set, problem.indices, beta2, ops, first) for factor_set, problem in problems
    ]
    moves = [
        [rule.rebase(State([c.stack], rule.orthogonal), c, ops) for c, _ in mine]
        for mine in changes
    ]
    for move in itertools.chain(*moves):
        next(move)
    results: list[Result] = []
    for piece in _pieces([problem for _, problem in problems]):
        found = once(_decompose, piece, solver, tau, borrowed)  # line 7
        # Two pieces may be of one problem.
        results += found
    left = iter(results)
    for (factor_set, problem), mine, generators in zip(problems, changes, moves, strict=True):
        done, parts = 0, []
        while done < len(problem.indices):
            parts.append(result := next(left))
            part = problem.indices[done : done + len(result.converged)]
            done += len(part)
            _finish(factor_set, part, result, rule, beta2, once, telemetry)
        for (change, positions), move in zip(mine, generators, strict=True):
            _tell(change, positions, parts)
            next(move, None)
    return True


def _count_checks(factor_set: FactorSet, indices: Sequence[int], spoiled: Sequence[int]) -> None:
    for i in indices:
        factor_set.checks[i] += 1
    for i in spoiled:
        factor_set.failures[i] += 1


def _index(factor_set: FactorSet, indices: Sequence[int]) -> Tensor:
    return torch.tensor(indices, device=factor_set.factors.device)


def _pieces(problems: Sequence[Problem]) -> Iterable[list[Problem]]:
    """What is solved at a time: on a GPU everything, planned as a whole; else so much that copies
    of the old operators take bounded memory."""
    together: list[Problem] = [problem for problem in problems if problem.factors.is_cuda]
    if together:
        yield together
    together, entries = [], 0
    for problem in problems:
        if problem.factors.is_cuda:
            continue
        for chunk in chunks(problem.indices, problem.n):
            size = len(chunk) * problem.n**2
            if together and entries + size > CHUNK_ENTRIES:
                yield together
                together, entries = [], 0
            together.append(Problem(problem.factors, problem.operators, chunk))
            entries += size
    if together:
        yield together


def _decompose(
    problems: Sequence[Problem], solver: Solver, tau: float, borrowed: Sequence[BorrowedMemory]
) -> list[Result]:
    """Solve them; what a solver gets wrong is solved again. Operators whose decomposition fails, or
    is none even so, are as they were; all are, if it raises an error."""
    kept = [aside(problem.operators, problem.indices) for problem in problems]
    try:
        results = solver.solve(problems, tau, borrowed)
        for again in (True, False):
            wrong = _wrong(problems, results, solver.promised(tau))
            for problem, result, positions in zip(problems, results, wrong, strict=True):
                if positions and again:
                    solver.again(problem, result, positions)
                for p in positions if not again else ():
                    result.converged[p] = False
            if not any(wrong):
                break
    except BaseException:
        for problem, old in zip(problems, kept, strict=True):
            _restore(problem, range(len(problem.indices)), old)
        raise
    for problem, result, old in zip(problems, results, kept, strict=True):
        _restore(problem, [p for p, ok in enumerate(result.converged) if not ok], old)
    return results


def _wrong(
    problems: Sequence[Problem], results: Sequence[Result], promised: float
) -> list[list[int]]:
    """Per problem, the positions of what is called converged and is no eigendecomposition."""
    checked = [
        sound(problem.factors, problem.operators, problem.indices, result.values, promised)
        for problem, result in zip(problems, results, strict=True)
    ]
    read = iter(torch.cat([x.to(checked[0].device) for x in checked]).tolist())
    wrong = []
    for problem, result in zip(problems, results, strict=True):
        fine = [next(read) for _ in problem.indices]
        wrong.append([p for p, ok in enumerate(result.converged) if ok and not fine[p]])
        if wrong[-1]:
            log.warning(
                "%d factors of size %d: the solver's result is no eigendecomposition",
                len(wrong[-1]),
                problem.n,
            )
    return wrong


def _restore(problem: Problem, positions: Sequence[int], old: Tensor) -> None:
    if positions:
        part = old if len(positions) == len(old) else old[list(positions)]
        indices = [problem.indices[p] for p in positions]
        put(problem.operators, indices, part.to(problem.operators.device))


def _changes(
    factor_set: FactorSet, indices: Sequence[int], beta2: float, ops: Operations, first: bool
) -> list[tuple[BasisChange, list[int]]]:
    """What happens to the blocks whose factors are among ``indices``, and where they are there."""
    return [
        (BasisChange(span.stack, span.mode, rows, ops, beta2, first), positions)
        for span, rows, positions in factor_set.spans_of(indices)
    ]


def _keep(
    factor_set: FactorSet, indices: Sequence[int], rule: Rule, beta2: float, ops: Operations
) -> None:
    """The rule learns the eigenvalues of factors whose operators are good enough."""
    values = ops.once(_rayleigh, factor_set, indices)
    for change, positions in _changes(factor_set, indices, beta2, ops, False):
        change.converged = [True] * len(positions)
        change.find_eigenvalues = functools.partial(take, values, positions)
        rule.keep(State([change.stack], rule.orthogonal), change, ops)
    ops.once(_make_ready, factor_set, indices)


@torch.no_grad()
def _rayleigh(factor_set: FactorSet, indices: Sequence[int]) -> Tensor:
    """diag(Q'LQ), [len(indices), n]."""
    parts = []
    for chunk in chunks(indices, factor_set.n):
        a, q = take(factor_set.factors, chunk), take(factor_set.operators, chunk)
        with matmul_precision("highest"):
            parts.append((q * (a @ q)).sum(-2))
    return torch.cat(parts)


def _tell(change: BasisChange, positions: Sequence[int], results: Sequence[Result]) -> None:
    """The change has happened: what of the results of its factor set is the change's."""
    converged = [ok for result in results for ok in result.converged]
    change.converged = [converged[p] for p in positions]
    change.find_eigenvalues = lambda: take(torch.cat([r.values for r in results]), positions)

    def permutation() -> Tensor | None:
        found = [r.permutation for r in results if r.permutation is not None]
        if not found:
            return None
        moved = take(torch.cat(found), positions)
        if not all(change.converged):  # those that failed have their old columns
            stays = torch.arange(moved.shape[-1], device=moved.device)
            good = torch.tensor(change.converged, device=moved.device)
            moved = torch.where(good[:, None], moved, stays)
        return moved

    change.find_permutation = permutation


def _finish(
    factor_set: FactorSet,
    indices: Sequence[int],
    result: Result,
    rule: Rule,
    beta2: float,
    once: Once,
    telemetry: Telemetry | None,
) -> None:
    """Count, mark rows as ready, and turn eigenvectors into the rule's operators."""
    once(_count_results, factor_set, indices, result)
    good = [p for p, ok in enumerate(result.converged) if ok]
    indices = [indices[p] for p in good]
    if telemetry is not None and good:
        once(telemetry.decomposed, factor_set, indices, take(result.values, good))
    order, correction = _orders(factor_set, indices, beta2)
    position = 0
    for chunk in chunks(indices, factor_set.n):
        part = slice(position, position + len(chunk))
        position += len(chunk)
        values = take(result.values, good[part])
        once(_put_operators, factor_set, chunk, values, order[part], correction[part], rule)


def _count_results(factor_set: FactorSet, indices: Sequence[int], result: Result) -> None:
    for i, ok in zip(indices, result.converged, strict=True):
        factor_set.refreshes[i] += ok
        factor_set.failures[i] += not ok
    _make_ready(factor_set, [i for i, ok in zip(indices, result.converged, strict=True) if ok])


def _make_ready(factor_set: FactorSet, indices: Sequence[int]) -> None:
    for span, rows, _ in factor_set.spans_of(indices):
        for r in rows:
            span.stack.ready[r] = True


def _orders(
    factor_set: FactorSet, indices: Sequence[int], beta2: float
) -> tuple[list[int], list[float]]:
    """Of the blocks that the factors belong to: how many modes, and 1 - beta2^t."""
    order, correction = [0] * len(indices), [0.0] * len(indices)
    for span, rows, positions in factor_set.spans_of(indices):
        for r, p in zip(rows, positions, strict=True):
            order[p] = len(span.stack.shape)
            correction[p] = 1 - beta2 ** span.stack.steps[r]
    return order, correction


def _put_operators(
    factor_set: FactorSet,
    indices: Sequence[int],
    values: Tensor,
    order: Sequence[int],
    correction: Sequence[float],
    rule: Rule,
) -> None:
    """Replace eigenvectors by what the rule makes of them."""
    vectors = take(factor_set.operators, indices)
    new = rule.operator(values, vectors, values.new_tensor(order), values.new_tensor(correction))
    if new is not vectors:
        put(factor_set.operators, indices, new)


def _roots_of_zero(factor_set: FactorSet, indices: Sequence[int], rule: Rule, beta2: float) -> None:
    """All-zero factors have the identity's eigenvectors."""
    eye = torch.eye(factor_set.n, dtype=factor_set.factors.dtype, device=factor_set.factors.device)
    for chunk in chunks(indices, factor_set.n):
        order, correction = _orders(factor_set, chunk, beta2)
        values = eye.new_zeros(len(chunk), factor_set.n)
        vectors = eye.expand(len(chunk), -1, -1)
        new = rule.operator(values, vectors, eye.new_tensor(order), eye.new_tensor(correction))
        put(factor_set.operators, chunk, new)
    for i in indices:
        factor_set.refreshes[i] += 1
    _make_ready(factor_set, indices)
