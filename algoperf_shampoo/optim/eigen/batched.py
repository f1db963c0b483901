"""A refresh on a GPU: all factors by cuSOLVER, several batches at a time, in idle memory.

A batch is thousands of short kernels one after the other, so batches on different streams overlap
almost perfectly, and what bounds them is memory: cuSOLVER wants 4 to 6 times the matrices. Three
kinds stand idle during a refresh: what the caller lends, operators that are not decomposed yet, and
cuBLAS's workspace.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from ..blocks.memory import BorrowedMemory
from ..blocks.rows import consecutive, longest_run
from . import cusolver
from .batch_plan import Batch, Plan, Room, Task, schedule
from .exact import mend, scale_of, shift_
from .host_offload import ALIGNMENT, as_bytes, offloaded, usable
from .problem import Problem, Result


def decompose(
    problems: Sequence[Problem], workspace: int, borrowed: Sequence[BorrowedMemory] = ()
) -> list[Result]:
    """All problems, which must be on one device that :mod:`.cusolver` is available for.

    What the operators at the problems' indices hold is lost at once.

    Args:
        workspace: bytes of memory taken anew, where that suffices for the largest matrix.
        borrowed: memory to work in besides; that on other devices is left alone.
    """
    device = problems[0].factors.device
    # Made anew when it is needed.
    torch._C._cuda_clearCublasWorkspaces()
    memories, rooms = [], []
    for x in borrowed:
        if x.memory.device == device:
            memories.append(as_bytes(x.memory[: usable(x)]))
            kept = (usable(x) - x.free) * x.memory.element_size()
            rooms.append(Room(len(memories[-1]), max(0, len(memories[-1]) - kept)))
    idle = [_operator_memory(problem) for problem in problems]
    tasks = tuple(
        Task(problem.n, len(problem.indices), _bytes_per_matrix(problem)) for problem in problems
    )
    found = schedule(tasks, tuple(map(len, idle)), tuple(rooms), workspace)
    own = torch.empty(found.used[0], dtype=torch.uint8, device=device)
    queues = [
        memory[:used] for memory, used in zip([own, *memories, *idle], found.used, strict=True)
    ]
    results = [Result.empty(problem) for problem in problems]
    with offloaded([queue[room.free :] for room, queue in zip(rooms, queues[1:], strict=False)]):
        for phase in found.phases:
            _run(phase, queues, problems, results)
    return results


def _operator_memory(problem: Problem) -> Tensor:
    """The memory of those of the problem's operators that stand in a row."""
    first, count = longest_run(problem.indices)
    return as_bytes(problem.operators[first : first + count])


def _bytes_per_matrix(problem: Problem) -> int:
    """Workspace per matrix, and room for a copy of it where it cannot be decomposed in place."""
    n, count, dtype, device = (
        problem.n,
        len(problem.indices),
        problem.factors.dtype,
        problem.factors.device,
    )
    copy = 0 if consecutive(problem.indices) else _aligned(n * n * dtype.itemsize)
    # The workspace grows linearly with the number of matrices, but for rounding.
    one, all_ = (cusolver.workspace_bytes(n, dtype, device, c) for c in (1, count))
    return _aligned(max(one, -(-all_ // count))) + copy


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _run(
    plan: Plan, queues: Sequence[Tensor], problems: Sequence[Problem], results: Sequence[Result]
) -> None:
    """Carry out a plan: each queue on a stream of its own, with a thread that launches.

    The streams start after what the current stream has been given so far, and it goes on after
    them.
    """
    device = queues[0].device
    caller = torch.cuda.current_stream(device)
    errors: list[BaseException] = []

    def work(queue: Tensor, mine: Sequence[Batch], stream: torch.cuda.Stream) -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream), torch.no_grad():
                stream.wait_stream(caller)
                for batch in mine:
                    if errors:
                        return
                    positions = range(batch.start, batch.start + batch.count)
                    done = _batch(problems[batch.task].part(positions), queue)
                    results[batch.task].put(positions, done)
        except BaseException as error:  # raised again by the caller
            errors.append(error)

    busy = [(queue, mine) for queue, mine in zip(queues, plan.queues, strict=True) if mine]
    streams = [_stream(device, i) for i in range(len(busy))]
    threads = [
        threading.Thread(target=work, args=(*arguments, stream))
        for arguments, stream in zip(busy, streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread, stream in zip(threads, streams, strict=True):
        thread.join()
        caller.wait_stream(stream)
    if errors:
        raise errors[0]


@functools.cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _batch(problem: Problem, queue: Tensor) -> Result:
    """One batch on the current stream: in place in ``operators`` where the indices are consecutive,
    else in the queue's memory. Waits for the device."""
    factors, first, count, n = problem.factors, problem.indices[0], len(problem.indices), problem.n
    in_place = consecutive(problem.indices)
    if in_place:
        target, work = problem.operators[first : first + count], queue
        target.copy_(factors[first : first + count])
    else:
        index = torch.tensor(problem.indices, device=factors.device)
        size = count * n * n * factors.element_size()
        target, work = queue[:size].view(factors.dtype).view(count, n, n), queue[_aligned(size) :]
        torch.index_select(factors, 0, index, out=target)
    scale = scale_of(target)
    shift = shift_(target.div_(scale[:, None, None]))
    values, converged = cusolver.eigh_(target, work)
    values.sub_(shift)
    mend(factors, problem.indices, values, target, converged)
    if not in_place:
        problem.operators.index_copy_(0, index, target)
    return Result(values * scale[:, None], converged)
