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

from ..blocks.layout import Lent
from ..blocks.rows import consecutive, longest_run
from . import cusolver
from .batch_plan import Batch, Plan, Room, Task, schedule
from .exact import mend, scale_of
from .host_offload import ALIGNMENT, as_bytes, parked, usable
from .problem import Job, Result


def decompose(jobs: Sequence[Job], workspace: int, lent: Sequence[Lent] = ()) -> list[Result]:
    """All jobs, which must be on one device that :mod:`.cusolver` is available for.

    What the operators at the jobs' indices hold is lost at once.

    Args:
        workspace: bytes of memory taken anew, where that suffices for the largest matrix.
        lent: memory to work in besides; that on other devices is left alone.
    """
    device = jobs[0].factors.device
    # Made anew when it is needed.
    torch._C._cuda_clearCublasWorkspaces()
    memories, rooms = [], []
    for x in lent:
        if x.memory.device == device:
            memories.append(as_bytes(x.memory[: usable(x)]))
            kept = (usable(x) - x.free) * x.memory.element_size()
            rooms.append(Room(len(memories[-1]), max(0, len(memories[-1]) - kept)))
    idle = [_operator_memory(job) for job in jobs]
    tasks = tuple(Task(job.n, len(job.indices), _bytes_per_matrix(job)) for job in jobs)
    found = schedule(tasks, tuple(map(len, idle)), tuple(rooms), workspace)
    own = torch.empty(found.used[0], dtype=torch.uint8, device=device)
    lanes = [
        memory[:used] for memory, used in zip([own, *memories, *idle], found.used, strict=True)
    ]
    results = [Result.empty(job) for job in jobs]
    with parked([lane[room.free :] for room, lane in zip(rooms, lanes[1:], strict=False)]):
        for phase in found.phases:
            _run(phase, lanes, jobs, results)
    return results


def _operator_memory(job: Job) -> Tensor:
    """The memory of those of the job's operators that stand in a row."""
    first, count = longest_run(job.indices)
    return as_bytes(job.operators[first : first + count])


def _bytes_per_matrix(job: Job) -> int:
    """Workspace per matrix, and room for a copy of it where it cannot be decomposed in place."""
    n, count, dtype, device = job.n, len(job.indices), job.factors.dtype, job.factors.device
    copy = 0 if consecutive(job.indices) else _aligned(n * n * dtype.itemsize)
    # The workspace grows linearly with the number of matrices, but for rounding.
    one, all_ = (cusolver.workspace_bytes(n, dtype, device, c) for c in (1, count))
    return _aligned(max(one, -(-all_ // count))) + copy


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _run(
    plan: Plan, lanes: Sequence[Tensor], jobs: Sequence[Job], results: Sequence[Result]
) -> None:
    """Carry out a plan: each lane on a stream of its own, with a thread that launches.

    The streams start after what the current stream has been given so far, and it goes on after
    them.
    """
    device = lanes[0].device
    caller = torch.cuda.current_stream(device)
    errors: list[BaseException] = []

    def work(lane: Tensor, mine: Sequence[Batch], stream: torch.cuda.Stream) -> None:
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream), torch.no_grad():
                stream.wait_stream(caller)
                for batch in mine:
                    if errors:
                        return
                    positions = range(batch.start, batch.start + batch.count)
                    done = _batch(jobs[batch.task].part(positions), lane)
                    results[batch.task].put(positions, done)
        except BaseException as error:  # raised again by the caller
            errors.append(error)

    busy = [(lane, mine) for lane, mine in zip(lanes, plan.lanes, strict=True) if mine]
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


def _batch(job: Job, lane: Tensor) -> Result:
    """One batch on the current stream: in place in ``operators`` where the indices are consecutive,
    else in the lane's memory. Waits for the device."""
    factors, first, count, n = job.factors, job.indices[0], len(job.indices), job.n
    in_place = consecutive(job.indices)
    if in_place:
        target, work = job.operators[first : first + count], lane
        target.copy_(factors[first : first + count])
    else:
        index = torch.tensor(job.indices, device=factors.device)
        size = count * n * n * factors.element_size()
        target, work = lane[:size].view(factors.dtype).view(count, n, n), lane[_aligned(size) :]
        torch.index_select(factors, 0, index, out=target)
    scale = scale_of(target)
    values, converged = cusolver.eigh_(target.div_(scale[:, None, None]), work)
    mend(factors, job.indices, values, target, converged)
    if not in_place:
        job.operators.index_copy_(0, index, target)
    return Result(values * scale[:, None], converged)
