"""Ctrl-C and SIGTERM: one line on where things stand, and exit code 130 or 143, at any moment.

A run can be killed at any moment without a loss, so the process ends at once, inside an import or
a kernel too. Who has children to end first asks for the exception instead. Standard library only:
scripts install this before they import anything else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType


@dataclass(frozen=True)
class _Place:
    say: Callable[[], str]
    unwinds: bool


_OUTSIDE = "no run was under way; the same command does what this one would have"
_places = [_Place(lambda: _OUTSIDE, unwinds=False)]
_interrupted = False
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """A signal came in a place that unwinds. ``line`` is for the user, ``code`` the exit code."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number
        self.line = _line()


def install() -> None:
    """Handle SIGINT and SIGTERM from here on; to be called in the main thread.

    One that came before, and was held back (``scripts/held.sh``), is answered now.
    """
    for number in _SIGNALS:
        signal.signal(number, _handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def saying(say: Callable[[], str]) -> Iterator[None]:
    """Inside, an interruption says ``say()``, if :func:`install` was called."""
    _places.append(_Place(say, unwinds=False))
    try:
        yield
    finally:
        _places.pop()


@contextmanager
def unwinding(say: Callable[[], str]) -> Iterator[None]:
    """Inside, the first signal raises :class:`Interrupted`, so that ``finally`` blocks run.

    A second one ends the process at once. Signals are handled here whether :func:`install` was
    called or not, if this is the main thread.
    """
    global _interrupted
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _handle) for number in _SIGNALS}
    _places.append(_Place(say, unwinds=True))
    _interrupted = False
    try:
        yield
    finally:
        _places.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted() -> bool:
    """Whether a signal has come, and what is under way is being unwound."""
    return _interrupted


def _handle(number: int, frame: FrameType | None) -> None:
    global _interrupted
    if _places[-1].unwinds and not _interrupted:
        _interrupted = True
        raise Interrupted(number)
    with suppress(Exception):  # a print that was cut short may hold the buffer
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, (_line() + "\n").encode(errors="backslashreplace"))
    os._exit(128 + number)


def _line() -> str:
    return f"interrupted: {_places[-1].say()}"
