"""Where the time of a training step goes: marks at the boundaries of its parts, and two clocks.

A mark is a point of the timeline on which the step runs: of the host on a CPU, of the current
stream on a GPU (an event, recorded and not waited for). The time between two marks is that of the
part in which the first one stands, so parts are what they are in the real step: work that another
stream or the host does meanwhile counts where the timeline waits for it, and nowhere twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch

PARTS = (
    "data", "forward_backward", "gather", "statistics", "eigen", "rotations", "update",
    "communication",
)  # fmt: skip
"""In the order of a step; ``gather`` is the optimizer's host work and its copies of gradients,
``update`` Adam, norms and the parameters."""
# What an optimizer calls the sections of its step.
SECTIONS = {"statistics": "statistics", "refresh": "eigen", "update": "update"}


class Clock(Protocol):
    """``nests``: whether marks may stand inside a section that a GPU replays as a graph."""

    nests: bool

    def mark(self) -> Any:
        """A point of the timeline."""

    def between(self, one: Any, other: Any) -> float:
        """Seconds between two marks, after :meth:`now`."""

    def now(self) -> float:
        """Seconds, once all that was given to the device is done."""


class HostClock:
    """Of a CPU, where everything is done when its call returns."""

    nests = True

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, one: float, other: float) -> float:
        return other - one

    def now(self) -> float:
        return time.perf_counter()


class DeviceClock:
    """Of a GPU's current stream."""

    nests = False

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, one: torch.cuda.Event, other: torch.cuda.Event) -> float:
        return one.elapsed_time(other) / 1e3

    def now(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()


class Timeline:
    """Marks, and the part that each begins. While ``on`` is False nothing is marked."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.on = clock, False
        self._marks: list[tuple[Any, str | None]] = []
        self._open: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to a part, but for what belongs to another one inside."""
        if not self.on:
            yield
            return
        self._open.append(name)
        self._marks.append((self.clock.mark(), name))
        try:
            yield
        finally:
            self._open.pop()
            self._marks.append((self.clock.mark(), self._open[-1] if self._open else None))

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call; to be called outside all parts."""
        self.clock.now()
        found: dict[str, float] = {}
        for (mark, name), (after, _) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                found[name] = found.get(name, 0.0) + self.clock.between(mark, after)
        self._marks.clear()
        return found


class Pairs:
    """Events around calls that a graph may record and replay: the time inside of one step.

    Recorded as external events, they are nodes of the graph, which each replay records anew.
    """

    def __init__(self) -> None:
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._kept: list[torch.cuda.Event] = []  # a graph that is replayed does not keep them
        self._fresh = False

    @contextmanager
    def around(self) -> Iterator[None]:
        """A call; the first one of a step forgets those of the step before."""
        if not self._fresh:
            self._pairs.clear()
            self._fresh = True
        pair = tuple(torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
        pair[0].record()
        yield
        pair[1].record()
        self._pairs.append((pair[0], pair[1]))
        self._kept += pair

    def take(self) -> float:
        """Seconds inside the calls of the step that has ended."""
        torch.cuda.synchronize()
        self._fresh = False
        return sum(one.elapsed_time(other) for one, other in self._pairs) / 1e3


def hook(optimizer: torch.optim.Optimizer, timeline: Timeline) -> None:
    """Mark the sections of every step of one of our optimizers, in its one place for sections."""
    once, step = optimizer._once, optimizer.step  # type: ignore[attr-defined]

    def marked_once(number: int, name: str, body: Callable[..., Any], *arguments: Any) -> Any:
        if name not in SECTIONS:
            return once(number, name, body, *arguments)
        with timeline.part(SECTIONS[name]):
            return once(number, name, body, *arguments)

    def marked_step(*arguments: Any, **more: Any) -> Any:
        with timeline.part("gather"):
            return step(*arguments, **more)

    marked_step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer._once, optimizer.step = marked_once, marked_step  # type: ignore[attr-defined, method-assign]


def hook_rotations(optimizer: torch.optim.Optimizer, around: Callable[[], Any]) -> int:
    """Put ``around()`` around every rotation of an update; how many places there are."""
    places = 0
    for group in optimizer._groups:  # type: ignore[attr-defined]
        for operations in (v for v in vars(group).values() if hasattr(v, "rotate_back")):
            for name in ("rotate", "rotate_back"):
                setattr(operations, name, _inside(getattr(operations, name), around))
                places += 1
    return places


def _inside(call: Callable[..., Any], around: Callable[[], Any]) -> Callable[..., Any]:
    def marked(*arguments: Any, **more: Any) -> Any:
        with around():
            return call(*arguments, **more)

    return marked


def amortised(
    ordinary: Mapping[str, float], due: Mapping[str, float], frequency: int
) -> dict[str, float]:
    """Each part of a mean step, when one step in ``frequency`` is one at which a check is due."""
    names = [name for name in PARTS if name in ordinary or name in due]
    share = 1.0 / frequency
    return {
        name: (1 - share) * ordinary.get(name, 0.0) + share * due.get(name, 0.0) for name in names
    }


def speed_up(
    one: Mapping[str, float], other: Mapping[str, float], steps: tuple[float, float]
) -> dict[str, float]:
    """Where the difference of two times to target comes from: seconds by part, and "steps".

    Time to target is steps times seconds a step, N s, s the sum of its parts (the residual among
    them). N1 s1 - N2 s2 = (N1 - N2) (s1 + s2) / 2 + sum of (p1 - p2) (N1 + N2) / 2 over the parts.
    """
    mean = (sum(one.values()) + sum(other.values())) / 2
    rows = {"steps": (steps[0] - steps[1]) * mean}
    for name in dict.fromkeys([*one, *other]):
        rows[name] = (one.get(name, 0.0) - other.get(name, 0.0)) * (steps[0] + steps[1]) / 2
    return rows
