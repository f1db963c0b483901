"""Ctrl-C and SIGTERM: one line on where things stand, and exit code 130 or 143, at any moment.

A run can be killed at any moment without a loss, so the process ends at once, inside an import or
a kernel too. Who has children to end first asks for the exception instead. Standard library only:
scripts install this before they import anything else.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType


@dataclass(frozen=True)
class _Place:
    say: Callable[[], str]
    unwinds: bool


_places = [_Place(lambda: "no run was under way; the same command goes on from there", False)]
_unwinding = False


class Interrupted(BaseException):
    """A signal came in a place that unwinds. ``line`` is for the user, ``code`` the exit code."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.code = 128 + signal_number
        self.line = _line()


def install() -> None:
    """Handle SIGINT and SIGTERM from here on; to be called in the main thread."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


@contextmanager
def saying(say: Callable[[], str], unwinds: bool = False) -> Iterator[None]:
    """Inside, an interruption says ``say()``.

    Args:
        unwinds: raise :class:`Interrupted`, so that ``finally`` blocks run; a second signal then
            ends the process at once. Else the first one does.
    """
    _places.append(_Place(say, unwinds))
    try:
        yield
    finally:
        _places.pop()


def _handle(number: int, frame: FrameType | None) -> None:
    global _unwinding
    if _places[-1].unwinds and not _unwinding:
        _unwinding = True
        raise Interrupted(number)
    with suppress(Exception):  # a print that was cut short may hold the buffer
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, (_line() + "\n").encode())
    os._exit(128 + number)


def _line() -> str:
    return f"interrupted: {_places[-1].say()}"
