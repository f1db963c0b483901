"""Simultaneous iteration from the old basis by QR: Algorithm 4, and SOAP's single step.

Q <- QR(A Q) is the paper's QR(Q'AQ) times Q. Columns move towards descending eigenvalues, so that
is the order to have them in; a basis that is sorted so beforehand says how its columns moved.

QR is Householder's (LAPACK, cuSOLVER), or on GPUs that multiply float64 fast, for float32, that of
:mod:`.cholesky_qr`, which has the same columns up to their signs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks.layout import BorrowedMemory
from ..blocks.rows import consecutive, put, take
from ..criterion import relative_off_diagonal
from ..ops.linalg import largest_entry, matmul_precision
from . import cholesky_qr
from .host_offload import ALIGNMENT, as_bytes
from .problem import Problem, Result

log = logging.getLogger(__name__)

# Of a chunk, per matrix entry: in borrowed memory two float64 and two float32 numbers, and two more
# where the matrices are copied; else six of the matrices' own.
BYTES_BORROWED, BYTES_OF_COPIES = 24, 8
ENTRIES_ANEW = 6


def iterate(
    problem: Problem,
    tau: float,
    iterations: int,
    sort: bool,
    limit: int,
    borrowed: Sequence[BorrowedMemory] = (),
) -> Result:
    """At most so many iterations of each basis: one at least, and on while Eq. 11 exceeds tau.

    Args:
        tau: threshold of Eq. 11; 0: all iterations, whatever it says.
        sort: whether columns are first put in the order of diag(Q'AQ), descending.
        limit: bytes of memory to take, if two matrices can be worked on within.
        borrowed: memory to work in besides, where it is free.

    Returns:
        diag(Q'AQ) as values; as permutation where each column came from, with ``sort``.
    """
    memory = _free_memory(problem, borrowed)
    size = _chunk(problem, memory, iterations, limit)
    values, permutations, converged = [], [], []
    for start in range(0, len(problem.indices), size):
        indices = problem.indices[start : start + size]
        workspace = Workspace(memory, (len(indices), problem.n, problem.n), problem.factors)
        with matmul_precision("highest"):
            a = workspace.taken(problem.factors, indices)
            q = workspace.taken(problem.operators, indices)
            # Tiny factors would underflow when squared.
            scale = largest_entry(a).clamp_min(torch.finfo(a.dtype).tiny)
            aq = torch.bmm(a, q, out=workspace.product).div_(scale[:, None, None])
            if sort:
                quotients = torch.mul(q, aq, out=workspace.spare).sum(-2)
                order = quotients.argsort(dim=-1, descending=True, stable=True)
                permutations.append(order)
                columns = order[:, None, :].expand_as(q)
                aq = torch.gather(aq, -1, columns, out=workspace.spare)
                old = torch.gather(q, -1, columns, out=workspace.sorted)
            new, bad = workspace.orthonormal(aq, old if sort else q)
            if bad:
                q = take(q, bad)
                if sort:
                    q = torch.gather(q, -1, take(order, bad)[:, None, :].expand_as(q))
                put(new, bad, _householder(take(a, bad), q, take(scale, bad)))
            q = new
            if iterations > 1:
                q = _iterated(a, scale, q, tau, iterations - 1, workspace)
            values.append(torch.bmm(a, q, out=workspace.spare).mul_(q).sum(-2))
        converged += torch.isfinite(q.sum((1, 2))).tolist()
        put(problem.operators, indices, q)
    return Result(torch.cat(values), converged, torch.cat(permutations) if sort else None)


def _free_memory(problem: Problem, borrowed: Sequence[BorrowedMemory]) -> Tensor:
    """Borrowed bytes that hold nothing, where float64 products are worth it and one matrix fits."""
    factors = problem.factors
    none = torch.empty(0, dtype=torch.uint8, device=factors.device)
    if factors.dtype != torch.float32 or not cholesky_qr.fast_float64(factors.device):
        return none
    free = [as_bytes(x.memory[: x.free]) for x in borrowed if x.memory.device == factors.device]
    largest = max(free, key=len, default=none)
    return largest if len(largest) >= _borrowed_bytes(problem) else none


def _borrowed_bytes(problem: Problem) -> int:
    """Per matrix, with what alignment may take."""
    copies = 0 if consecutive(problem.indices) else BYTES_OF_COPIES
    return (BYTES_BORROWED + copies) * problem.n**2 + 8 * ALIGNMENT


def _chunk(problem: Problem, memory: Tensor, iterations: int, limit: int) -> int:
    """How many matrices are worked on at a time."""
    entry = problem.n**2 * problem.factors.dtype.itemsize
    if not len(memory):
        return max(1, limit // (ENTRIES_ANEW * entry))
    size = len(memory) // _borrowed_bytes(problem)
    # Those left of a chunk are copied, and looked at, in memory taken anew.
    return size if iterations == 1 else min(size, max(1, limit // (4 * entry)))


class Workspace:
    """Memory for one chunk of matrices [N, n, n], in free bytes of borrowed memory or taken anew.

    Attributes:
        product, sorted, spare: of the matrices' dtype; ``spare`` is free but while
            :meth:`orthonormal` is at work.
    """

    def __init__(self, memory: Tensor, shape: tuple[int, int, int], like: Tensor) -> None:
        self._memory, self._shape, self._at, self._dtype = memory, shape, 0, like.dtype
        self._doubles: list[Tensor] = []
        if like.dtype == torch.float32 and cholesky_qr.fast_float64(like.device):
            self._doubles = [self._new(torch.float64) for _ in range(2)]
            in_double = self._doubles[1].view(-1).view(torch.float32)
            self.spare = in_double[: math.prod(shape)].view(shape)
        else:
            self.spare = self._new(like.dtype)
        self.product, self.sorted = self._new(like.dtype), self._new(like.dtype)

    def _new(self, dtype: torch.dtype) -> Tensor:
        size = math.prod(self._shape) * dtype.itemsize
        start = self._at
        if not len(self._memory):
            return torch.empty(self._shape, dtype=dtype, device=self._memory.device)
        self._at += -(-size // ALIGNMENT) * ALIGNMENT
        return self._memory[start : start + size].view(dtype).view(self._shape)

    def taken(self, x: Tensor, indices: Sequence[int]) -> Tensor:
        """x[indices]: a view, or a copy."""
        if consecutive(indices):
            return take(x, indices)
        index = torch.tensor(indices, device=x.device)
        return torch.index_select(x, 0, index, out=self._new(x.dtype))

    def orthonormal(self, x: Tensor, q: Tensor) -> tuple[Tensor, list[int]]:
        """Q of x = QR for stacks, in ``product``, and for whom that failed. x = A q in ``product``
        or ``spare``, which is overwritten, and so is ``sorted``."""
        out = self.product[: len(x)]
        if not self._doubles:
            return out.copy_(torch.linalg.qr(x).Q), []
        work, gram = (d[: len(x)] for d in self._doubles)
        good = cholesky_qr.orthonormal_(work.copy_(x), gram, q, out, self.sorted[: len(x)])
        bad = [i for i, fine in enumerate(good) if not fine]
        if bad:
            log.info("%d of size %d go to Householder's QR", len(bad), x.shape[-1])
        return out, bad


def _iterated(
    a: Tensor, scale: Tensor, q: Tensor, tau: float, iterations: int, workspace: Workspace
) -> Tensor:
    """So many iterations more, those of matrices that do not meet Eq. 11."""
    q, left = q.clone(), list(range(len(q)))
    for _ in range(iterations):
        some = take(a, left), take(q, left)
        if tau > 0:
            again = (relative_off_diagonal(*some) > tau).tolist()
            left = [i for i, yes in zip(left, again, strict=True) if yes]
            if not left:
                break
            some = take(a, left), take(q, left)
        aq = torch.bmm(*some, out=workspace.product[: len(left)])
        aq /= take(scale, left)[:, None, None]
        new, bad = workspace.orthonormal(aq, some[1])
        if bad:
            those = take(some[0], bad), take(some[1], bad), take(take(scale, left), bad)
            put(new, bad, _householder(*those))
        put(q, left, new)
    return q


def _householder(a: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    return torch.linalg.qr(a @ q / scale[:, None, None]).Q
