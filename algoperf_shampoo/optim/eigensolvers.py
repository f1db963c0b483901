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
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cusolver
from .linalg import relative_off_diagonal
from .precision import matmul_precision

log = logging.getLogger(__name__)

METHODS = ("eigh", "warm")
ORTHOGONALIZATIONS = ("cholesky", "householder")

WARM_MIN = 64  # below this size a warm start does not pay
WARM_COPIES = 6  # matrices alive per matrix while iterating


@dataclass(frozen=True)
class Job:
    """Matrices to decompose: operators[indices] receive the eigenvectors of factors[indices].

    factors, operators: [N, n, n]. On entry operators[indices] are the old eigenvectors (columns by
    ascending eigenvalue), the warm start.
    """

    factors: Tensor
    operators: Tensor
    indices: list[int]


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
        workspace_mib: bound on the memory a refresh takes anew. cuSOLVER needs 3 to 5 times the
            matrices it decomposes together, and takes as long for four of size 1024 as for sixteen,
            so the gradient buffer and the moments' memory serve as well, the moments standing
            aside on the host.

    Raises:
        ValueError: an unknown method or a number out of range.
    """

    method: str = "eigh"
    orthogonalization: str = "cholesky"
    max_iterations: int = 4
    tolerance: float = 0.01
    workspace_mib: int = 88

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
        scratch: Sequence[Tensor] = (),
        park: Sequence[Tensor] = (),
    ) -> list[Result]:
        """Decompose all jobs' matrices, which must be symmetric, finite and not zero.

        Args:
            tau: threshold of Eq. 11.
            scratch: flat tensors that may be overwritten, used as workspace.
            park: flat tensors used likewise where that helps; their contents are kept on the host
                meanwhile and are there again afterwards.
        """
        if self.method == "warm":
            return [self._warm_job(job, tau or self.tolerance) for job in jobs]
        if jobs and jobs[0].factors.is_cuda and cusolver.available():
            _say_once("cuSOLVER XsyevBatched")
            return _in_lanes(jobs, self.workspace_mib * 2**20, scratch, park)
        _say_once("torch.linalg.eigh")
        return [_direct_job(job, self.workspace_mib * 2**20) for job in jobs]

    def _warm_job(self, job: Job, tau: float) -> Result:
        n = job.factors.shape[-1]
        values = job.factors.new_empty(len(job.indices), n)
        converged: list[bool] = []
        size = self.workspace_mib * 2**20 // (WARM_COPIES * n * n * job.factors.element_size())
        for start, part in _chunks(job.indices, size):
            a, old = take(job.factors, part), take(job.operators, part)
            lam, q, ok = self.warm(a, old, tau) if n >= WARM_MIN else exact(a)
            values[start : start + len(part)] = lam
            put(job.operators, part, q)
            converged += ok
        return Result(values, converged)

    def warm(self, a: Tensor, old: Tensor, tau: float) -> tuple[Tensor, Tensor, list[bool]]:
        """Eigenvalues [N, n] ascending and vectors [N, n, n] of a such that Eq. 11 holds with
        tau."""
        values = torch.empty_like(a[..., 0])
        vectors = torch.empty_like(a)
        converged = [True] * len(a)
        left = list(range(len(a)))
        x = old.flip(-1)  # the iteration sorts by descending eigenvalue
        for _ in range(self.max_iterations):
            x = orthogonal_iteration(a, x, self.orthogonalization)
            with matmul_precision("highest"):
                off = relative_off_diagonal(a, x)
            # A matrix whose orthogonalization failed reads nan, and stays among those left.
            good = [p for p, o in enumerate(off.tolist()) if o <= tau]
            if good:
                lam, q = sort_ascending(take(a, good), take(x, good))
                put(values, [left[p] for p in good], lam)
                put(vectors, [left[p] for p in good], q)
                bad = sorted(set(range(len(left))) - set(good))
                left = [left[p] for p in bad]
                if not left:
                    return values, vectors, converged
                a, x = take(a, bad), take(x, bad)
        log.info("%d of size %d not below tau after iterating", len(left), a.shape[-1])
        lam, q, ok = exact(a)
        put(values, left, lam)
        put(vectors, left, q)
        for i, c in zip(left, ok, strict=True):
            converged[i] = c
        return values, vectors, converged


def take(x: Tensor, indices: Sequence[int]) -> Tensor:
    """x[indices] along the first dimension: a view when they are consecutive, else a copy."""
    first, count = indices[0], len(indices)
    if indices[-1] == first + count - 1 and list(indices) == list(range(first, first + count)):
        return x[first : first + count]
    return x[torch.tensor(indices, device=x.device)]


def put(x: Tensor, indices: Sequence[int], value: Tensor) -> None:
    """x[indices] = value along the first dimension."""
    x.index_copy_(0, torch.tensor(indices, device=x.device), value)


def _chunks(indices: list[int], size: int) -> list[tuple[int, list[int]]]:
    """(position, indices) of pieces of at most ``size`` (at least 1)."""
    size = max(1, size)
    return [(s, indices[s : s + size]) for s in range(0, len(indices), size)]


def orthogonal_iteration(a: Tensor, x: Tensor, orthogonalization: str = "cholesky") -> Tensor:
    """One sweep towards the eigenvectors of a [N, n, n] from orthogonal x, by descending
    eigenvalue.

    Multiply by a (plus a small multiple of the identity), orthogonalize, then solve exactly in the
    span of the leading quarter (Rayleigh-Ritz): simultaneous iteration alone separates close
    leading eigenvalues slowly, and those are what Eq. 11 weighs.

    The shift, 1e-3 ||a||_F, bounds the condition of the product by 1e3 whatever the rank of a,
    which Cholesky-QR in float32 needs (its Gram matrix has the square); it slows down only
    directions whose eigenvalues are below it. A matrix for which Cholesky fails nevertheless comes
    back as nan.
    """
    n = a.shape[-1]
    lead = max(32, n // 4)
    with matmul_precision("highest"):
        shift = 1e-3 * torch.linalg.matrix_norm(a)[:, None, None]
        y = torch.baddbmm(shift * x, a, x)
        x = _cholesky_qr2(y) if orthogonalization == "cholesky" else torch.linalg.qr(y).Q
        top = x[..., :lead]
        small = top.mT @ (a @ top)
        _, z, _ = exact(torch.nan_to_num(small))
        x[..., :lead] = top @ z.flip(-1)
    return x


def _cholesky_qr2(y: Tensor) -> Tensor:
    """Q of y = QR, by Cholesky of y'y, twice: the second pass repairs the first one's rounding."""
    for _ in range(2):
        y /= y.square().mean((-2, -1), keepdim=True).sqrt()
        upper, _ = torch.linalg.cholesky_ex(y.mT @ y, upper=True)
        y = torch.linalg.solve_triangular(upper, y, upper=True, left=False)
    return y


def sort_ascending(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients of the columns of x, ascending, and the columns in that order."""
    with matmul_precision("highest"):
        lam = (x * (a @ x)).sum(-2)
    lam, order = lam.sort(dim=-1)
    return lam, x.gather(-1, order[:, None, :].expand_as(x))


def exact(a: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    """Eigenvalues [N, n], vectors [N, n, n] and who converged, of a few matrices of one size."""
    scaled, scale = _scaled(a)
    values, vectors, converged = _exact_scaled(scaled)
    return values * scale[:, None], vectors, converged


def _exact_scaled(a: Tensor) -> tuple[Tensor, Tensor, list[bool]]:
    if a.is_cuda and cusolver.available():
        workspace = cusolver.workspace(a.shape[-1], a.dtype, a.device, len(a))
        values, converged = cusolver.eigh_(a, workspace)
        _mend(a, values, a, converged)
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
    consecutive = job.indices == list(range(first, first + count))
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


def _in_lanes(
    jobs: Sequence[Job], workspace_bytes: int, scratch: Sequence[Tensor], park: Sequence[Tensor]
) -> list[Result]:
    """All jobs by cuSOLVER, in batches that fit the workspaces, several batches at a time.

    A batch is thousands of short kernels one after the other, so batches on several streams overlap
    almost perfectly. Each stream ("lane") has a workspace, and a thread that launches.
    """
    device = jobs[0].factors.device
    largest = max(jobs, key=lambda job: job.factors.shape[-1]).factors
    least = _bytes_per_matrix(largest)
    wanted = sum(_bytes_per_matrix(job.factors) * len(job.indices) for job in jobs)
    own = torch.empty(max(least, min(workspace_bytes, wanted)), dtype=torch.uint8, device=device)
    lanes = [own, *(flat for x in scratch if (flat := x.view(torch.uint8)).numel() >= least)]
    lanes = lanes[: len(_streams(device.index))]
    spare = len(_streams(device.index)) - len(lanes)
    parked = [x for x in park if x.numel() * x.element_size() >= least][:spare]
    if wanted <= sum(lane.numel() for lane in lanes):
        parked = []  # there is room enough without
    results = [
        Result(
            job.factors.new_empty(len(job.indices), job.factors.shape[-1]),
            [True] * len(job.indices),
        )
        for job in jobs
    ]
    todo = deque(sorted(enumerate(jobs), key=lambda x: -x[1].factors.shape[-1]))
    position = dict.fromkeys(range(len(jobs)), 0)
    lock = threading.Lock()

    def next_batch(room: int) -> tuple[int, int, Job] | None:
        """(number of the job, position in it, as many of its matrices as fit)."""
        with lock:
            if not todo:
                return None
            number, job = todo[0]
            start = position[number]
            part = job.indices[start : start + max(1, room // _bytes_per_matrix(job.factors))]
            position[number] = start + len(part)
            if position[number] == len(job.indices):
                todo.popleft()
            return number, start, Job(job.factors, job.operators, part)

    errors: list[BaseException] = []
    caller = torch.cuda.current_stream(device)

    def work(lane: Tensor, stream: torch.cuda.Stream) -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream), torch.no_grad():
                stream.wait_stream(caller)
                while not errors and (batch := next_batch(lane.numel())) is not None:
                    number, start, piece = batch
                    done = _cusolver_job(piece, lane)
                    stop = start + len(piece.indices)
                    results[number].values[start:stop] = done.values
                    results[number].converged[start:stop] = done.converged
        except RuntimeError as error:
            errors.append(error)

    with _parked(parked):
        lanes += [x.view(torch.uint8) for x in parked]
        pairs = list(zip(lanes, _streams(device.index), strict=False))
        threads = [threading.Thread(target=work, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread, (_, stream) in zip(threads, pairs, strict=True):
            thread.join()
            caller.wait_stream(stream)
    if errors:
        raise errors[0]
    return results


def _bytes_per_matrix(factors: Tensor) -> int:
    """Workspace per matrix, and room for a copy of it."""
    n, dtype = factors.shape[-1], factors.dtype
    return _aligned(cusolver.workspace_bytes(n, dtype, factors.device, 1) + n * n * dtype.itemsize)


@contextlib.contextmanager
def _parked(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Tensors' contents stand aside in (pinned) host memory while their memory serves otherwise."""
    hosts = [_pinned(i, x.numel(), x.dtype) for i, x in enumerate(tensors)]
    for host, x in zip(hosts, tensors, strict=True):
        host.copy_(x, non_blocking=True)
    try:
        yield
    finally:
        for host, x in zip(hosts, tensors, strict=True):
            x.copy_(host, non_blocking=True)


@functools.cache
def _pinned(number: int, numel: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(numel, dtype=dtype, pin_memory=True)


@functools.cache
def _streams(device: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(4)]


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
