"""Which queue decomposes which matrices, in what order, and in which memory.

A queue is a piece of memory and a stream. Everything here is fixed beforehand from sizes and bytes
alone. Were it first come, first served, timing would decide whether a matrix is decomposed in a
batch or alone, by another algorithm with other rounding, and replicas would part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cusolver import better_alone, milliseconds

LARGE = 512  # larger sizes come first, in the memory of the others' operators too
# Single matrices on several streams hardly overlap: n = 1024 takes 12.0 ms on one, 9.7 on two, 8.5
# on four, per matrix.
SINGLES_OVERLAP = 0.75
OFFLOADING = 0.06 / 2**20  # ms per byte, to the host and back
WORTHWHILE = 0.95  # a further queue must save a twentieth of the time


@dataclass(frozen=True)
class Task:
    """``count`` matrices of size ``n``, each taking ``bytes_each`` of a queue's memory."""

    n: int
    count: int
    bytes_each: int


@dataclass(frozen=True)
class Batch:
    """Matrices start : start + count of a task, decomposed together."""

    task: int
    start: int
    count: int


@dataclass(frozen=True)
class Plan:
    """Per queue its batches, one after the other; milliseconds: expected, until all are done."""

    queues: tuple[tuple[Batch, ...], ...]
    milliseconds: float


@dataclass(frozen=True)
class Room:
    """Bytes of a piece of borrowed memory; what is used beyond the first ``free`` is offloaded."""

    bytes: int
    free: int


@dataclass(frozen=True)
class Schedule:
    """Plans to carry out one after the other, and what they need.

    Queues are numbered alike in all: a workspace, the borrowed pieces, each task's operators.
    used: per queue, how many bytes of its memory any batch takes.
    """

    phases: tuple[Plan, ...]
    used: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def schedule(
    tasks: tuple[Task, ...], idle: tuple[int, ...], borrowed: tuple[Room, ...], workspace: int
) -> Schedule:
    """The plan of a refresh: all sizes at once, or the large ones first.

    While the large ones are decomposed, the others' operators are memory to work in. Of the
    possibilities (so or at once, with offloading or without) the one that takes least memory of its
    own, then least time.

    Args:
        tasks: one for each problem.
        idle: per task, bytes of its operators that may be overwritten until it is decomposed.
        borrowed: the borrowed pieces.
        workspace: bytes of the workspace, where that suffices; else it gets what the largest matrix
            needs.
    """
    everything = list(range(len(tasks)))
    large = [k for k in everything if tasks[k].n > LARGE]
    small = [k for k in everything if tasks[k].n <= LARGE]
    orders = [[large, small]] if large and small else []
    options = []
    for order in [*orders, [everything]]:
        for offloading in (True, False):
            pieces = [room.bytes if offloading else room.free for room in borrowed]
            options.append((order, _rooms(tasks, idle, pieces, workspace, order)))
    least = min(rooms[0][0] for _, rooms in options)
    best, time = None, math.inf
    for order, rooms in options:
        if rooms[0][0] > least:
            continue
        found = _in_phases(tasks, rooms, order, time)
        if found is None:
            continue
        offloaded = sum(max(0, u - x.free) for x, u in zip(borrowed, found.used[1:], strict=False))
        total = sum(p.milliseconds for p in found.phases) + OFFLOADING * offloaded
        if total < time:
            best, time = found, total
    assert best is not None
    return best


def _rooms(
    tasks: Sequence[Task],
    idle: Sequence[int],
    pieces: Sequence[int],
    workspace: int,
    order: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Per phase, the bytes of the queues, if the phases decompose the tasks named."""
    rooms = []
    for number, phase in enumerate(order):
        later = {k for other in order[number + 1 :] for k in other}
        rooms.append([*pieces, *(x if k in later else 0 for k, x in enumerate(idle))])
        needed = max(tasks[k].bytes_each for k in phase)
        if needed > max(rooms[-1]):
            workspace = max(workspace, needed)
    return [[workspace, *others] for others in rooms]


def _in_phases(
    tasks: Sequence[Task],
    rooms: Sequence[Sequence[int]],
    order: Sequence[Sequence[int]],
    limit: float,
) -> Schedule | None:
    """The schedule of these phases, or None if it takes ``limit`` ms."""
    plans: list[Plan] = []
    used = [0] * len(rooms[0])
    for phase, queues in zip(order, rooms, strict=True):
        mine = [t if k in phase else replace(t, count=0) for k, t in enumerate(tasks)]
        found = plan(mine, queues, limit)
        if found is None:
            return None
        limit -= found.milliseconds
        plans.append(found)
        for i, queue in enumerate(found.queues):
            used[i] = max([used[i], *(b.count * tasks[b.task].bytes_each for b in queue)])
    return Schedule(tuple(plans), tuple(used))


def plan(tasks: Sequence[Task], rooms: Sequence[int], limit: float = math.inf) -> Plan | None:
    """What each queue does, given the bytes of its memory; None if that takes ``limit`` ms.

    Queues that hardly help do nothing.

    Raises:
        ValueError: no queue holds a matrix of the largest size.
    """
    largest_first = sorted(range(len(rooms)), key=lambda i: -rooms[i])
    best = None
    for count in range(1, len(rooms) + 1):
        found = _greedy(tasks, rooms, largest_first[:count], limit)
        if found is not None:
            best, limit = found, WORTHWHILE * found.milliseconds
    return best


def _greedy(
    tasks: Sequence[Task], rooms: Sequence[int], queues: Sequence[int], limit: float
) -> Plan | None:
    """Whichever of the queues is free first, by the expected times, takes the next batch."""
    order = sorted(range(len(tasks)), key=lambda k: -tasks[k].n)
    left = [task.count for task in tasks]
    batches: list[list[Batch]] = [[] for _ in rooms]
    free = dict.fromkeys(queues, 0.0)
    single_free = end = 0.0
    while any(left):
        if not free:
            raise ValueError(f"no queue of {max(rooms)} bytes holds a matrix of the largest size")
        queue = min(free, key=lambda i: free[i])
        choice = _next(tasks, left, order, rooms[queue])
        if choice is None:
            del free[queue]
            continue
        k, count = choice
        batches[queue].append(Batch(k, tasks[k].count - left[k], count))
        left[k] -= count
        time = milliseconds(tasks[k].n, count)
        if better_alone(tasks[k].n, count):
            free[queue] = max(free[queue], single_free)
            single_free = free[queue] + SINGLES_OVERLAP * time
        free[queue] += time
        end = max(end, free[queue])
        if end >= limit:
            return None
    return Plan(tuple(map(tuple, batches)), end)


def _next(
    tasks: Sequence[Task], left: Sequence[int], order: Sequence[int], room: int
) -> tuple[int, int] | None:
    """(task, count) for a queue of that room, or None where it holds none of what is left.

    Large matrices first. A queue with room for a batch looks for what fills one, and takes what
    does not only when there is nothing else; the other queues take single ones.
    """
    single = None
    for k in order:
        fits = room // tasks[k].bytes_each
        if not left[k] or not fits:
            continue
        count = min(left[k], fits)
        if not better_alone(tasks[k].n, count):
            return k, count
        if single is None:
            single = k, 1
        if better_alone(tasks[k].n, fits):
            break
    return single
