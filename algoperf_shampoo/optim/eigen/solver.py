"""Eigendecompositions of stacks of symmetric matrices: the back ends, and who is asked when.

| method | what runs | relative error |
|---|---|---|
| "eigh", GPU | cuSOLVER in batches (or torch.linalg.eigh), then the CPU in float64 | 3e-6 |
| "eigh", CPU | torch.linalg.eigh (LAPACK), then in float64 | 2e-6 |
| "warm" | orthogonal iteration from the old basis until Eq. 11 holds, then "eigh" | tau |
| "qr" | simultaneous iteration from the old basis, ``max_iterations`` at most (Algorithm 4) | any |

QR is Householder's, and for float32 on data centres' GPUs that of :mod:`.cholesky_qr`.

The error is ||A - Q Lambda Q'|| / ||A|| in float32.

The order in which back ends are asked depends on device, size and versions alone, never on a
timing, so that replicas agree.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks.memory import BorrowedMemory
from ..blocks.rows import consecutive, put, take
from . import batched, cusolver, exact, simultaneous
from .host_offload import ALIGNMENT, offloaded, usable
from .orthogonal_iteration import ORTHOGONALIZATIONS, sweep_
from .problem import Problem, Result

log = logging.getLogger(__name__)

METHODS = ("eigh", "warm", "qr")
WARM_MIN = 64  # below this size a warm start does not pay
SWEEP_TOGETHER = 16  # matrices; a sweep over more is hardly faster per matrix


@dataclass(frozen=True)
class Solver:
    """Decomposes stacks of factors; one matrix's failure spares the others.

    Args:
        method: "eigh", "warm" or "qr".
        orthogonalization: of "warm": "cholesky" (Cholesky-QR, twice) or "householder".
        max_iterations: of "warm", where what has not converged by then goes to "eigh"; of "qr",
            where it stays as it is.
        tolerance: of "warm" where tau = 0 (fixed frequency): Eq. 11 is brought below it.
        workspace_mib: bound on the memory a refresh takes anew, if the largest matrix can be
            decomposed within it or elsewhere. cuSOLVER needs 4 to 6 times the matrices it
            decomposes together, and takes hardly longer for many than for eight, so borrowed memory
            serves as well, its contents standing aside on the host, and operators that are not
            decomposed yet.
        sort: of "qr": columns are put in descending order of diag(Q'AQ) before the iterations, and
            the result says how; else they stay in their order.
        descending: of "eigh": columns by descending eigenvalue instead of ascending.

    Raises:
        ValueError: an unknown method or a number out of range.
    """

    method: str = "eigh"
    orthogonalization: str = "cholesky"
    max_iterations: int = 4
    tolerance: float = 0.01
    workspace_mib: int = 8
    sort: bool = True
    descending: bool = False

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("orthogonalization", ORTHOGONALIZATIONS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in ("max_iterations", "workspace_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)!r}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must be in (0, 1), got {self.tolerance!r}")

    def solve(
        self,
        problems: Sequence[Problem],
        tau: float,
        borrowed: Sequence[BorrowedMemory] = (),
    ) -> list[Result]:
        """Decompose all problems' matrices, which must be symmetric, finite and not zero.

        Args:
            tau: threshold of Eq. 11.
            borrowed: memory to work in besides.
        """
        if self.method == "qr":
            limit = self.workspace_mib * 2**20
            n = self.max_iterations
            return [
                simultaneous.iterate(problem, tau, n, self.sort, limit, borrowed)
                for problem in problems
            ]
        if self.method == "eigh":
            results = self._exact(problems, borrowed)
            if self.descending:
                results = [_reversed(j, r) for j, r in zip(problems, results, strict=True)]
            return results
        results = [Result.empty(problem) for problem in problems]
        left = self._iterate(problems, results, tau or self.tolerance, borrowed)
        for k, positions in left.items():
            log.info("%d of size %d not below tau after iterating", len(positions), problems[k].n)
        left |= {k: list(range(len(j.indices))) for k, j in enumerate(problems) if j.n < WARM_MIN}
        rest = self._exact([problems[k].part(positions) for k, positions in left.items()], borrowed)
        for (k, positions), result in zip(left.items(), rest, strict=True):
            results[k].put(positions, result)
        return results

    def again(self, problem: Problem, result: Result, positions: Sequence[int]) -> None:
        """Decompose anew, in float64 on the CPU, what :meth:`solve` returned as converged and is no
        eigendecomposition; not after "qr", whose old basis is better."""
        if self.method == "qr":
            for p in positions:
                result.converged[p] = False
            return
        part = problem.part(positions)
        found = exact.by_lapack(part)
        result.put(positions, _reversed(part, found) if self.descending else found)

    def promised(self, tau: float) -> float:
        """The left side of Eq. 11 that :meth:`solve` stops at; 0 where it decomposes exactly."""
        if self.method == "qr":
            return math.inf
        return 0.0 if self.method == "eigh" else tau or self.tolerance

    def start(self) -> Solver:
        """What decomposes factors for the first time where a rule starts with that: exactly, in the
        order that the method goes on from."""
        return Solver(workspace_mib=self.workspace_mib, descending=self.method == "qr")

    def _exact(
        self, problems: Sequence[Problem], borrowed: Sequence[BorrowedMemory]
    ) -> list[Result]:
        """By cuSOLVER in batches where it is available, else by torch.linalg.eigh."""
        limit = self.workspace_mib * 2**20
        results: dict[int, Result] = {}
        for device in dict.fromkeys(problem.factors.device for problem in problems):
            here = [k for k, problem in enumerate(problems) if problem.factors.device == device]
            mine = [problems[k] for k in here]
            if device.type == "cuda" and cusolver.available():
                _say_once("cuSOLVER XsyevBatched")
                done = batched.decompose(mine, limit, borrowed)
            else:
                _say_once("torch.linalg.eigh")
                done = [exact.decompose(problem, limit) for problem in mine]
            results.update(zip(here, done, strict=True))
        return [results[k] for k in range(len(problems))]

    def _iterate(
        self,
        problems: Sequence[Problem],
        results: Sequence[Result],
        tau: float,
        borrowed: Sequence[BorrowedMemory],
    ) -> dict[int, list[int]]:
        """Sweeps over all matrices that are left, one host read after each.

        Returns: per problem, the positions of those not below tau by then.
        """
        left = {k: list(range(len(j.indices))) for k, j in enumerate(problems) if j.n >= WARM_MIN}
        limit = self.workspace_mib * 2**20
        with _two_pieces([problems[k] for k in left], limit, borrowed) as pieces:
            for _ in range(self.max_iterations):
                if not left:
                    break
                off = [self._sweep(problems[k], results[k], left[k], pieces) for k in left]
                read = iter(torch.cat([x.to(off[0].device) for x in off]).tolist())
                # Not `>`: nan, of a failed orthogonalization, stays among those left.
                again = {k: [p for p in left[k] if not next(read) <= tau] for k in left}
                left = {k: positions for k, positions in again.items() if positions}
        return left

    def _sweep(
        self,
        problem: Problem,
        result: Result,
        positions: list[int],
        pieces: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """One sweep over the problem's matrices at ``positions``: the left sides of Eq. 11."""
        n, factors, operators = problem.n, problem.factors, problem.operators
        one, two = pieces[factors.dtype, factors.device]
        room = min(len(one), len(two)) // (n * n)
        offs = []
        start = 0
        while start < len(positions):
            part = positions[start : start + room]
            indices = [problem.indices[p] for p in part]
            if in_place := consecutive(indices):
                a, x = take(factors, indices), take(operators, indices)
                y, z = (_stack(piece, 0, len(part), n) for piece in (one, two))
            else:  # copies, which take half of the memory
                part = part[: max(1, room // 2)]
                indices = indices[: len(part)]
                index = torch.tensor(indices, device=factors.device)
                a, x = (_stack(one, i, len(part), n) for i in (0, 1))
                y, z = (_stack(two, i, len(part), n) for i in (0, 1))
                torch.index_select(factors, 0, index, out=a)
                torch.index_select(operators, 0, index, out=x)
            values, off = sweep_(a, x, y, z, self.orthogonalization)
            if not in_place:
                put(operators, indices, x)
            put(result.values, part, values)
            offs.append(off)
            start += len(part)
        return torch.cat(offs)


def _reversed(problem: Problem, result: Result) -> Result:
    """Columns in the opposite order."""
    for i in problem.indices:
        problem.operators[i] = problem.operators[i].flip(-1)
    return Result(result.values.flip(-1), result.converged)


def _stack(piece: Tensor, number: int, count: int, n: int) -> Tensor:
    """The ``number``-th [count, n, n] in a flat piece of memory."""
    size = count * n * n
    return piece[number * size : (number + 1) * size].view(count, n, n)


@contextlib.contextmanager
def _two_pieces(
    problems: Sequence[Problem], limit: int, borrowed: Sequence[BorrowedMemory]
) -> Iterator[dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]]]:
    """Per dtype and device two flat pieces of memory, each for two matrices at least.

    New memory within ``limit`` bytes where all matrices of a size fit there, or where it is more
    than what is borrowed; else that.
    """
    pieces, parts = {}, []
    for kind in {(problem.factors.dtype, problem.factors.device) for problem in problems}:
        mine = [
            problem
            for problem in problems
            if (problem.factors.dtype, problem.factors.device) == kind
        ]
        least = 2 * max(problem.n**2 for problem in mine)
        wanted = max(max(len(problem.indices) * problem.n**2 for problem in mine), least)
        entries = max(least, limit // (2 * kind[0].itemsize))
        known = [
            x for x in borrowed if (x.memory.dtype, x.memory.device) == kind and x.memory.is_cuda
        ]
        # What holds something is offloaded only if the rest is too small to sweep well.
        enough = max(min(len(problem.indices), SWEEP_TOGETHER) * problem.n**2 for problem in mine)
        room = 0
        if known:
            free = known[0].free // 2
            room = free if free >= enough else usable(known[0]) // 2
        if wanted > entries and room > entries:
            step = ALIGNMENT // kind[0].itemsize  # each piece starts aligned
            half = min(-(-wanted // step), room // step) * step
            memory = known[0].memory[: 2 * half]
            pieces[kind] = memory[:half], memory[half:]
            parts.append(memory[known[0].free :])
        else:
            size = min(wanted, entries)
            empty = mine[0].factors.new_empty
            pieces[kind] = empty(size), empty(size)
    with offloaded(parts):
        yield pieces


@functools.cache
def _say_once(name: str) -> None:
    log.info("eigendecompositions by %s", name)
