"""Eigendecompositions of stacks of symmetric matrices: the back ends, and who is asked when.

| method | what runs | relative error |
|---|---|---|
| "eigh", GPU | cuSOLVER in batches (or torch.linalg.eigh), then the CPU in float64 | 3e-6 |
| "eigh", CPU | torch.linalg.eigh (LAPACK), then in float64 | 2e-6 |
| "warm" | orthogonal iteration from the old basis until Eq. 11 holds, then "eigh" | tau |

The error is ||A - Q Lambda Q'|| / ||A|| in float32.

The order in which back ends are asked depends on device, size and versions alone, never on a
timing, so that replicas agree.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cusolver
from .buckets import Lent
from .lanes import Batch, Task, plan
from .warm import ORTHOGONALIZATIONS, sweep_

log = logging.getLogger(__name__)

METHODS = ("eigh", "warm")
WARM_MIN = 64  # below this size a warm start does not pay


@dataclass(frozen=True)
class Job:
    """Matrices to decompose: operators[indices] receive the eigenvectors of factors[indices].

    factors, operators: [N, n, n]. On entry operators[indices] are the old eigenvectors (columns by
    ascending eigenvalue), the warm start.
    """

    factors: Tensor
    operators: Tensor
    indices: list[int]

    @property
    def n(self) -> int:
        return self.factors.shape[-1]


@dataclass(frozen=True)
class Result:
    """values: [len(indices), n] ascending; converged: per index. Where it is False the vectors are
    I."""

    values: Tensor
    converged: list[bool]


@dataclass(frozen=True)
class Solver:
    """Decomposes stacks of factors; one matrix's failure spares the others.

    Args:
        method: "eigh" or "warm".
        orthogonalization: of "warm": "cholesky" (Cholesky-QR, twice) or "householder".
        max_iterations: of "warm"; what has not converged by then goes to "eigh".
        tolerance: of "warm" where tau = 0 (fixed frequency): Eq. 11 is brought below it.
        workspace_mib: bound on the memory a refresh takes anew. cuSOLVER needs 4 to 6 times the
            matrices it decomposes together, and takes as long for two of size 1024 as for sixteen,
            so the gradient buffer and the moments' memory serve as well, the moments standing
            aside on the host.

    Raises:
        ValueError: an unknown method or a number out of range.
    """

    method: str = "eigh"
    orthogonalization: str = "cholesky"
    max_iterations: int = 4
    tolerance: float = 0.01
    workspace_mib: int = 72

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
        jobs: Sequence[Job],
        tau: float,
        lent: Sequence[Lent] = (),
    ) -> list[Result]:
        """Decompose all jobs' matrices, which must be symmetric, finite and not zero.

        Args:
            tau: threshold of Eq. 11.
            lent: memory to work in besides.
        """
        if self.method == "warm":
            return self._warm(jobs, tau or self.tolerance, lent)
        if jobs and jobs[0].factors.is_cuda and cusolver.available():
            _say_once("cuSOLVER XsyevBatched")
            return _in_lanes(jobs, self.workspace_mib * 2**20, lent)
        _say_once("torch.linalg.eigh")
        return [_direct_job(job, self.workspace_mib * 2**20) for job in jobs]

    def _warm(self, jobs: Sequence[Job], tau: float, lent: Sequence[Lent]) -> list[Result]:
        """Sweeps over all matrices that are left, one host read after each."""
        limit = self.workspace_mib * 2**20
        results = [_direct_job(j, limit) if j.n < WARM_MIN else _empty_result(j) for j in jobs]
        left = {k: list(range(len(j.indices))) for k, j in enumerate(jobs) if j.n >= WARM_MIN}
        with _two_pieces([jobs[k] for k in left], limit, lent) as pieces:
            for _ in range(self.max_iterations):
                if not left:
                    return results
                off = [self._sweep(jobs[k], results[k], left[k], pieces) for k in left]
                read = iter(torch.cat([x.to(off[0].device) for x in off]).tolist())
                # Not `>`: nan, of a failed orthogonalization, stays among those left.
                again = {k: [p for p in left[k] if not next(read) <= tau] for k in left}
                left = {k: positions for k, positions in again.items() if positions}
        for k, positions in left.items():
            log.info("%d of size %d not below tau after iterating", len(positions), jobs[k].n)
            part = [jobs[k].indices[p] for p in positions]
            exact_result = _direct_job(Job(jobs[k].factors, jobs[k].operators, part), limit)
            put(results[k].values, positions, exact_result.values)
            for p, ok in zip(positions, exact_result.converged, strict=True):
                results[k].converged[p] = ok
        return results

    def _sweep(
        self,
        job: Job,
        result: Result,
        positions: list[int],
        pieces: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """One sweep over the job's matrices at ``positions``: the left sides of Eq. 11."""
        n, factors, operators = job.n, job.factors, job.operators
        one, two = pieces[factors.dtype, factors.device]
        room = min(len(one), len(two)) // (n * n)
        offs = []
        start = 0
        while start < len(positions):
            part = positions[start : start + room]
            indices = [job.indices[p] for p in part]
            if in_place := _consecutive(indices):
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


def _consecutive(indices: Sequence[int]) -> bool:
    first, count = indices[0], len(indices)
    return indices[-1] == first + count - 1 and list(indices) == list(range(first, first + count))


def _stack(piece: Tensor, number: int, count: int, n: int) -> Tensor:
    """The ``number``-th [count, n, n] in a flat piece of memory."""
    size = count * n * n
    return piece[number * size : (number + 1) * size].view(count, n, n)


def _empty_result(job: Job) -> Result:
    values = job.factors.new_empty(len(job.indices), job.n)
    return Result(values, [True] * len(job.indices))


@contextlib.contextmanager
def _two_pieces(
    jobs: Sequence[Job], limit: int, lent: Sequence[Lent]
) -> Iterator[dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]]]:
    """Per dtype and device two flat pieces of memory, each for two matrices at least.

    New memory within ``limit`` bytes where all matrices of a size fit there, or where it is more
    than what is lent; else that.
    """
    pieces, parked = {}, []
    for kind in {(job.factors.dtype, job.factors.device) for job in jobs}:
        mine = [job for job in jobs if (job.factors.dtype, job.factors.device) == kind]
        least = 2 * max(job.n**2 for job in mine)
        wanted = max(max(len(job.indices) * job.n**2 for job in mine), least)
        entries = max(least, limit // (2 * kind[0].itemsize))
        known = [x for x in lent if (x.memory.dtype, x.memory.device) == kind and x.memory.is_cuda]
        if wanted > entries and known and len(known[0].memory) // 2 > entries:
            # A multiple of 64 entries: cuSOLVER's workspace wants to be aligned.
            half = min(-(-wanted // 64), len(known[0].memory) // 128) * 64
            pieces[kind] = known[0].memory[:half], known[0].memory[half : 2 * half]
            parked.append(known[0].memory[known[0].free : 2 * half])
        else:
            size = min(wanted, entries)
            empty = mine[0].factors.new_empty
            pieces[kind] = empty(size), empty(size)
    with _parked(parked):
        yield pieces


def take(x: Tensor, indices: Sequence[int]) -> Tensor:
    """x[indices] along the first dimension: a view when they are consecutive, else a copy."""
    if _consecutive(indices):
        return x[indices[0] : indices[0] + len(indices)]
    return x[torch.tensor(indices, device=x.device)]


def put(x: Tensor, indices: Sequence[int], value: Tensor) -> None:
    """x[indices] = value along the first dimension."""
    x.index_copy_(0, torch.tensor(indices, device=x.device), value)


def _chunks(indices: list[int], size: int) -> list[tuple[int, list[int]]]:
    """(position, indices) of pieces of at most ``size`` (at least 1)."""
    size = max(1, size)
    return [(s, indices[s : s + size]) for s in range(0, len(indices), size)]


def exact(a: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    """Eigenvalues [N, n], vectors [N, n, n] and who converged, of a few matrices of one size."""
    scaled, scale = _scaled(a)
    values, vectors, converged = _exact_scaled(scaled)
    if not all(converged):  # from `a` again: cuSOLVER works in place
        _mend(_scaled(a)[0], values, vectors, converged)
    return values * scale[:, None], vectors, converged


def _exact_scaled(a: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    if a.is_cuda and cusolver.available():
        workspace = cusolver.workspace(a.shape[-1], a.dtype, a.device, len(a))
        values, converged = cusolver.eigh_(a, workspace)
        return values, a, converged
    try:
        values, vectors = torch.linalg.eigh(a)
    except torch.linalg.LinAlgError:
        return _one_by_one(a)
    return values, vectors, torch.isfinite(vectors).all(-1).all(-1).tolist()


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """a / s and s [N], s the largest entry of each matrix.

    Float32 gradients of 1e-12 give factors of 1e-24, whose squares inside a solver underflow.
    """
    scale = a.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(a.dtype).tiny)
    return a / scale[:, None, None], scale


def _direct_job(job: Job, workspace: int) -> Result:
    """By torch.linalg.eigh, in pieces that fit the workspace."""
    n = job.factors.shape[-1]
    values = job.factors.new_empty(len(job.indices), n)
    converged: list[bool] = []
    for start, part in _chunks(job.indices, workspace // (4 * n * n * values.element_size())):
        lam, q, ok = exact(take(job.factors, part))
        values[start : start + len(part)] = lam
        put(job.operators, part, q)
        converged += ok
    return Result(values, converged)


def _cusolver_job(job: Job, lane: Tensor) -> Result:
    """One batch by cuSOLVER: in place in ``operators`` where the indices are consecutive, else in
    the lane's memory."""
    factors, first, count = job.factors, job.indices[0], len(job.indices)
    n = factors.shape[-1]
    index = torch.tensor(job.indices, device=factors.device)
    consecutive = _consecutive(job.indices)
    if consecutive:
        target, work = job.operators[first : first + count], lane
        target.copy_(factors[first : first + count])
    else:
        size = count * n * n * factors.element_size()
        target, work = lane[:size].view(factors.dtype).view(count, n, n), lane[_aligned(size) :]
        torch.index_select(factors, 0, index, out=target)
    scale = target.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(factors.dtype).tiny)
    values, converged = cusolver.eigh_(target.div_(scale[:, None, None]), work)
    if not all(converged):
        _mend(_scaled(factors[index])[0], values, target, converged)
    if not consecutive:
        job.operators.index_copy_(0, index, target)
    return Result(values * scale[:, None], converged)


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def _mend(a: Tensor, values: Tensor, vectors: Tensor, converged: list[bool]) -> None:
    """Decompose again, by other means, what did not converge."""
    failed = [p for p, ok in enumerate(converged) if not ok]
    if failed:
        lam, q, again = _one_by_one(take(a, failed))
        put(values, failed, lam)
        put(vectors, failed, q)
        for p, ok in zip(failed, again, strict=True):
            converged[p] = ok


def _in_lanes(jobs: Sequence[Job], workspace_bytes: int, lent: Sequence[Lent]) -> list[Result]:
    """All jobs by cuSOLVER, in batches that fit the memory, several batches at a time.

    A batch is thousands of short kernels one after the other, so batches on two streams overlap
    almost perfectly. Each stream ("lane") has a piece of memory, and a thread that launches: what
    is lent takes the largest batches, a workspace of its own what does not pay in batches.
    """
    device = jobs[0].factors.device
    least = max(_bytes_per_matrix(job) for job in jobs)
    wanted = sum(_bytes_per_matrix(job) * len(job.indices) for job in jobs)
    # The cuBLAS workspace is idle meanwhile; it is made anew when it is needed.
    torch._C._cuda_clearCublasWorkspaces()
    own = torch.empty(max(least, min(workspace_bytes, wanted)), dtype=torch.uint8, device=device)
    lanes, parked = [own], []
    for x in lent[: len(_streams(device.index)) - 1]:
        # Without parking, if all fits there.
        free = wanted <= own.numel() + x.free * x.memory.element_size()
        lane = (x.memory[: x.free] if free else x.memory).view(torch.uint8)
        if x.memory.device == device and lane.numel() >= least:
            lanes.append(lane)
            parked += [] if free else [x.memory[x.free :]]
    results = [_empty_result(job) for job in jobs]
    tasks = [Task(job.n, len(job.indices), _bytes_per_matrix(job)) for job in jobs]
    batches = plan(tasks, [lane.numel() for lane in lanes])
    errors: list[BaseException] = []
    caller = torch.cuda.current_stream(device)

    def work(lane: Tensor, mine: list[Batch], stream: torch.cuda.Stream) -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream), torch.no_grad():
                stream.wait_stream(caller)
                for batch in mine:
                    if errors:
                        return
                    job, result = jobs[batch.task], results[batch.task]
                    part = slice(batch.start, batch.start + batch.count)
                    done = _cusolver_job(Job(job.factors, job.operators, job.indices[part]), lane)
                    result.values[part] = done.values
                    result.converged[part] = done.converged
        except BaseException as error:  # raised again by the caller
            errors.append(error)

    with _parked(parked):
        streams = _streams(device.index)[: len(lanes)]
        threads = [
            threading.Thread(target=work, args=arguments)
            for arguments in zip(lanes, batches, streams, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread, stream in zip(threads, streams, strict=True):
            thread.join()
            caller.wait_stream(stream)
    if errors:
        raise errors[0]
    return results


def _bytes_per_matrix(job: Job) -> int:
    """Workspace per matrix, and room for a copy of it where it cannot be decomposed in place."""
    n, dtype = job.n, job.factors.dtype
    copy = 0 if _consecutive(job.indices) else _aligned(n * n * dtype.itemsize)
    return _aligned(cusolver.workspace_bytes(n, dtype, job.factors.device, 1)) + copy


@contextlib.contextmanager
def _parked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Tensors' contents stand aside in (pinned) host memory while their memory serves otherwise."""
    hosts = [_pinned(i, x) for i, x in enumerate(tensors)]
    for host, x in zip(hosts, tensors, strict=True):
        host.copy_(x, non_blocking=True)
    try:
        yield
    finally:
        for host, x in zip(hosts, tensors, strict=True):
            x.copy_(host, non_blocking=True)


_PINNED: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def _pinned(number: int, x: Tensor) -> Tensor:
    """Pinned host memory like x, kept for the next refresh: pinning takes longer than copying."""
    key = number, x.dtype, x.device
    known = _PINNED.get(key)
    if known is None or known.numel() < x.numel():
        known = _PINNED[key] = torch.empty(x.numel(), dtype=x.dtype, pin_memory=True)
    return known[: x.numel()]


@functools.cache
def _streams(device: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(3)]


@functools.cache
def _say_once(name: str) -> None:
    log.info("eigendecompositions by %s", name)


def _one_by_one(a: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    """After a batch failed: each matrix alone, in float64 on the CPU; I where that fails too."""
    values = torch.zeros_like(a[..., 0])
    vectors = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).repeat(len(a), 1, 1)
    converged = []
    for i, matrix in enumerate(a.double().cpu()):
        try:
            lam, q = torch.linalg.eigh(matrix)
        except torch.linalg.LinAlgError as error:
            log.warning("a factor of size %d has no eigendecomposition: %s", a.shape[-1], error)
            converged.append(False)
            continue
        if not torch.isfinite(q).all():
            converged.append(False)
            continue
        values[i].copy_(lam)
        vectors[i].copy_(q)
        converged.append(True)
    return values, vectors, converged
