"""Which lane decomposes which matrices, and in what order.

Fixed beforehand from sizes alone. Were it first come, first served, timing would decide whether a
matrix is decomposed in a batch or alone, by another algorithm with other rounding, and replicas
would part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cusolver import better_alone, milliseconds


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


def plan(tasks: Sequence[Task], rooms: Sequence[int]) -> list[list[Batch]]:
    """Per lane, given the bytes of its memory, what it does one after the other.

    Large matrices first; the next batch goes to the lane that is free first by the expected times.
    The lane with most memory looks for what fills a batch, the others take what does not.
    """
    order = sorted(range(len(tasks)), key=lambda k: -tasks[k].n)
    position = [0] * len(tasks)
    free = [0.0] * len(rooms)
    lanes: list[list[Batch]] = [[] for _ in rooms]
    while True:
        lane = min(range(len(rooms)), key=lambda i: free[i])
        choice = None
        for k in order:
            task = tasks[k]
            left = task.count - position[k]
            if not left:
                continue
            count = min(left, max(1, rooms[lane] // task.bytes_each))
            alone = better_alone(task.n, count)
            if choice is None:
                choice = Batch(k, position[k], 1 if alone else count)
                if rooms[lane] < max(rooms):
                    break
            if not alone:
                choice = Batch(k, position[k], count)
                break
        if choice is None:
            return lanes
        position[choice.task] += choice.count
        free[lane] += milliseconds(tasks[choice.task].n, choice.count)
        lanes[lane].append(choice)
