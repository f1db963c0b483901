"""Which lane decomposes which matrices, in what order, and in which memory.

A lane is a piece of memory and a stream. Everything here is fixed beforehand from sizes and bytes
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
PARKING = 0.06 / 2**20  # ms per byte, to the host and back
WORTHWHILE = 0.95  # a further lane must save a twentieth of the time


@dataclass(frozen=True)
class Task:
    """``count`` matrices of size ``n``, each taking ``bytes_each`` of a lane's memory."""

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
    """Per lane its batches, one after the other; milliseconds: expected, until all are done."""

    lanes: tuple[tuple[Batch, ...], ...]
    milliseconds: float


@dataclass(frozen=True)
class Room:
    """Bytes of a piece of lent memory; what is used beyond the first ``free`` is parked."""

    bytes: int
    free: int


@dataclass(frozen=True)
class Schedule:
    """Plans to carry out one after the other, and what they need.

    Lanes are numbered alike in all of them: a workspace, the lent pieces, each task's operators.
    used: per lane, how many bytes of its memory any batch takes.
    """

    phases: tuple[Plan, ...]
    used: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def schedule(
    tasks: tuple[Task, ...], idle: tuple[int, ...], lent: tuple[Room, ...], workspace: int
) -> Schedule:
    """The plan of a refresh: all sizes at once, or the large ones first.

    While the large ones are decomposed, the others' operators are memory to work in. Of the
    possibilities (so or at once, with parking or without) the one that takes least memory of its
    own, then least time.

    Args:
        tasks: one for each job.
        idle: per task, bytes of its operators that may be overwritten until it is decomposed.
        lent: the lent pieces.
        workspace: bytes of the workspace, where that suffices; else it gets what the largest matrix
            needs.
    """
    everything = list(range(len(tasks)))
    large = [k for k in everything if tasks[k].n > LARGE]
    small = [k for k in everything if tasks[k].n <= LARGE]
    orders = [[large, small]] if large and small else []
    options = []
    for order in [*orders, [everything]]:
        for parking in (True, False):
            pieces = [room.bytes if parking else room.free for room in lent]
            options.append((order, _rooms(tasks, idle, pieces, workspace, order)))
    least = min(rooms[0][0] for _, rooms in options)
    best, time = None, math.inf
    for order, rooms in options:
        if rooms[0][0] > least:
            continue
        found = _in_phases(tasks, rooms, order, time)
        if found is None:
            continue
        parked = sum(max(0, u - x.free) for x, u in zip(lent, found.used[1:], strict=False))
        total = sum(p.milliseconds for p in found.phases) + PARKING * parked
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
    """Per phase, the bytes of the lanes, if the phases decompose the tasks named."""
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
    for phase, lanes in zip(order, rooms, strict=True):
        mine = [t if k in phase else replace(t, count=0) for k, t in enumerate(tasks)]
        found = plan(mine, lanes, limit)
        if found is None:
            return None
        limit -= found.milliseconds
        plans.append(found)
        for i, lane in enumerate(found.lanes):
            used[i] = max([used[i], *(b.count * tasks[b.task].bytes_each for b in lane)])
    return Schedule(tuple(plans), tuple(used))


def plan(tasks: Sequence[Task], rooms: Sequence[int], limit: float = math.inf) -> Plan | None:
    """What each lane does, given the bytes of its memory; None if that takes ``limit`` ms.

    Lanes that hardly help do nothing.

    Raises:
        ValueError: no lane holds a matrix of the largest size.
    """
    largest_first = sorted(range(len(rooms)), key=lambda i: -rooms[i])
    best = None
    for count in range(1, len(rooms) + 1):
        found = _greedy(tasks, rooms, largest_first[:count], limit)
        if found is not None:
            best, limit = found, WORTHWHILE * found.milliseconds
    return best


def _greedy(
    tasks: Sequence[Task], rooms: Sequence[int], lanes: Sequence[int], limit: float
) -> Plan | None:
    """Whichever of the lanes is free first, by the expected times, takes the next batch."""
    order = sorted(range(len(tasks)), key=lambda k: -tasks[k].n)
    left = [task.count for task in tasks]
    batches: list[list[Batch]] = [[] for _ in rooms]
    free = dict.fromkeys(lanes, 0.0)
    single_free = end = 0.0
    while any(left):
        if not free:
            raise ValueError(f"no lane of {max(rooms)} bytes holds a matrix of the largest size")
        lane = min(free, key=lambda i: free[i])
        choice = _next(tasks, left, order, rooms[lane])
        if choice is None:
            del free[lane]
            continue
        k, count = choice
        batches[lane].append(Batch(k, tasks[k].count - left[k], count))
        left[k] -= count
        time = milliseconds(tasks[k].n, count)
        if better_alone(tasks[k].n, count):
            free[lane] = max(free[lane], single_free)
            single_free = free[lane] + SINGLES_OVERLAP * time
        free[lane] += time
        end = max(end, free[lane])
        if end >= limit:
            return None
    return Plan(tuple(map(tuple, batches)), end)


def _next(
    tasks: Sequence[Task], left: Sequence[int], order: Sequence[int], room: int
) -> tuple[int, int] | None:
    """(task, count) for a lane of that room, or None where it holds none of what is left.

    Large matrices first. A lane with room for a batch looks for what fills one, and takes what does
    not only when there is nothing else; the other lanes take single ones.
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
