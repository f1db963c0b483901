"""What of a step is done, so that a step that failed half-way goes on where it stopped.

Most of a step can be computed again from what it started with. What cannot is every write that
changes what it reads: factors, moments, parameters, counters. Each such write is one operation that
either happens or does not, and stands in a journal; so does what was decided on the way. A step
that is tried again computes its way along the same operations, and those in the journal are passed
over. No copy of anything is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Once(Protocol):
    """Calls operation(*arguments), or returns what it returned before the step failed."""

    def __call__(self, operation: Callable[..., T], *arguments: Any, **more: Any) -> T: ...


def directly(operation: Callable[..., T], *arguments: Any, **more: Any) -> T:
    """The :class:`Once` that keeps no journal."""
    return operation(*arguments, **more)


# Runs a named section of a step: Run(name, section) is section(), or a replay of its recording.
Run = Callable[[str, Callable[[], Any]], Any]


def directly_run(name: str, section: Callable[[], Any]) -> Any:
    """The :data:`Run` that records nothing."""
    return section()


class Journal:
    """One step's operations, in sections. Empty while no step is under way or has failed."""

    def __init__(self) -> None:
        self._lost = ""  # why nobody knows what the state is
        self._error = ""
        self.clear()

    def __bool__(self) -> bool:
        """Whether anything has been done that must not be done twice."""
        return bool(self._finished or any(self._parts.values()))

    def clear(self) -> None:
        """The step is complete."""
        self._finished: dict[Hashable, Any] = {}
        self._parts: dict[Hashable, list[Any]] = {}
        self._list: list[Any] | None = None  # of the section at work; None: nothing is entered
        self._next = 0
        self._entered = False  # whether any operation was begun

    def replace(self) -> None:
        """The state has been replaced by another, which is complete."""
        self._lost = self._error = ""
        self.clear()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A step, or another try of one that failed: complete at the end.

        Raises:
            RuntimeError: nobody knows what the state is.
        """
        if self._lost:
            raise RuntimeError(self._lost)
        try:
            yield
        except BaseException as error:
            self._failed(error)
            raise
        self.clear()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """A part of a step that ranks take together: one that fails cannot take it again alone."""
        try:
            yield
        except BaseException as error:
            self._lost = (
                f"the last step failed where ranks exchange updates ({type(error).__name__}: "
                f"{error}); load_state_dict() with a saved state goes on from there, on all ranks"
            )
            raise

    def check_complete(self) -> None:
        """
        Raises:
            RuntimeError: the state is that of half a step.
        """
        if self._lost:
            raise RuntimeError(self._lost)
        if self:
            raise RuntimeError(
                f"the last step failed half-way ({self._error}); step() with the same gradients "
                "finishes it, load_state_dict() replaces it"
            )

    def _failed(self, error: BaseException) -> None:
        self._error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        interrupted = self._entered and not isinstance(error, Exception)
        if interrupted or is_of_device(error):
            why = "was interrupted" if interrupted else "ended with an error of the device"
            self._lost = (
                f"the last step {why} ({self._error}), and what the state is, is not known; "
                "load_state_dict() with a saved one goes on from there"
            )
        elif not self:
            self.clear()

    def section(self, key: Hashable, body: Callable[[], T]) -> T:
        """body(), with :meth:`once` for its operations; not again when it is complete."""
        if key in self._finished:
            return self._finished[key]
        outer = self._list, self._next
        self._list, self._next = self._parts.setdefault(key, []), 0
        try:
            result = body()
        finally:
            self._list, self._next = outer
        self._finished[key] = result
        del self._parts[key]
        return result

    def once(self, operation: Callable[..., T], *arguments: Any, **more: Any) -> T:
        """operation(*arguments), one that happens or does not; its result where it has happened.

        Operations must come in the same order when a step is tried again. One inside another is
        part of that.
        """
        done = self._list
        if done is None:
            return operation(*arguments, **more)
        if self._next < len(done):
            result = done[self._next]
        else:
            self._list, self._entered = None, True
            try:
                result = operation(*arguments, **more)
            finally:
                self._list = done
            done.append(result)
        self._next += 1
        return result

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Operations are called and not entered: they are being recorded as a graph."""
        done, self._list = self._list, None
        try:
            yield
        finally:
            self._list = done


def is_of_device(error: BaseException) -> bool:
    """Whether it is a device's own error, after which nothing there can be read any more; running
    out of its memory is none."""
    text = str(error)
    kinds = getattr(torch, "AcceleratorError", ()), RuntimeError
    return (
        isinstance(error, kinds)
        and not isinstance(error, torch.OutOfMemoryError)
        and ("CUDA error" in text or "device-side assert" in text)
        and "out of memory" not in text
    )
