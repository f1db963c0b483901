"""The processes of one run under AlgoPerf's runner: they start, and end, together.

torch elastic starts its workers in sessions of their own, so a killed ``torchrun`` leaves them
alive, and so does a killed process group. Here (Linux):

* the launcher adopts what its descendants leave behind (a subreaper), and ends all of it when the
  runner has ended, by whatever death;
* ``torchrun`` is killed by the kernel when the launcher dies, and each worker when ``torchrun``
  dies (``PR_SET_PDEATHSIG``; :mod:`.worker` asks for it in the worker itself);
* all of them hold the run's lock as their standard input (:mod:`..run_lock`), so that even a
  survivor, of whatever kind, keeps a second launch from writing beside it.

Other systems have the runner as a child alone: it is terminated when the launcher ends in order.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo import interrupt
from algoperf_shampoo.harness.run_lock import process_start

LAUNCHER = "ALGOPERF_SHAMPOO_LAUNCHER"
"""Environment variable with "pid start" of the launcher that a process of a run belongs to."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL, and for what a runner that ended leaves to end by itself."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER, _PR_GET_CHILD_SUBREAPER = 1, 36, 37
_LINUX = sys.platform == "linux"
# Loaded now: between fork and exec little is allowed.
_LIBC: Any = ctypes.CDLL(None, use_errno=True) if _LINUX else None
# torch elastic, on the worker whose death ended the others.
_WORKER = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")


@dataclass(frozen=True)
class Ending:
    """How a runner ended: its exit code (negative: the signal), in words, and who outlived it."""

    exit_code: int
    how: str
    left_behind: tuple[str, ...]


def run(
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    lock: int,
    on_line: Callable[[str], None],
    say: Callable[[], str] = lambda: "the runner was ended",
) -> Ending:
    """Run a program to its end, with all processes it starts, and give it no input.

    ``lock`` is the descriptor that holds the run's lock. ``on_line`` gets each line printed, with
    its end, in a thread of its own. ``say`` is what an interruption says.

    An exception, of a signal too, leaves only when every process has been ended. A terminal's
    Ctrl-C reaches us alone: the program has a process group of its own.
    """
    before = set(_children(os.getpid()))
    worker: list[tuple[int, int]] = []
    launcher = f"{os.getpid()} {process_start(os.getpid())}"
    with _adopting(), interrupt.unwinding(say):
        process = subprocess.Popen(
            arguments,
            cwd=cwd,
            env={**environment, LAUNCHER: launcher},
            stdin=lock,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )

        def copy() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if match := _WORKER.search(line):
                    worker.append((int(match[1]), int(match[2])))
                on_line(line)

        reader = threading.Thread(target=copy, daemon=True)
        reader.start()
        patience = 0.0
        try:
            if process.wait() == 0:
                patience = GRACE
        finally:
            left = _end_all(process, before, patience)
            reader.join(timeout=10)
    return Ending(process.returncode, _how(process.returncode, worker), tuple(left))


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux for SIGKILL when the parent dies; end now if it is dead already.

    For a child between fork and exec, which knows its ``parent``, and for a worker once it runs,
    which knows its launcher: the request survives exec, not fork.
    """
    if not _LINUX:
        return
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the request.
    if not (_of_launcher() if parent is None else os.getppid() == parent):
        os._exit(128 + signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Every process below ``pid``, parents before children; zombies, which have ended, are not."""
    children: dict[int, list[int]] = {}
    for child, (state, parent) in _processes().items():
        if state not in "ZX":
            children.setdefault(parent, []).append(child)
    found, level = [], [pid]
    while level:
        level = [child for parent in level for child in children.get(parent, ())]
        found += level
    return found


def signal_name(number: int) -> str:
    """``SIGKILL``, or ``signal 99`` where there is no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _of_launcher() -> bool:
    """Whether the launcher named in the environment is alive and above us; True if none is."""
    words = os.environ.get(LAUNCHER, "").split()
    if len(words) != 2:
        return True  # a command printed by a dry run, given by hand
    launcher, start = int(words[0]), words[1]
    if str(process_start(launcher)) != start:
        return False
    known, pid = _processes(), os.getpid()
    while pid > 1:
        if pid == launcher:
            return True
        pid = known.get(pid, ("", 0))[1]
    return False


def _end_all(process: subprocess.Popen[str], before: set[int], patience: float) -> list[str]:
    """End the runner and all that it started; those that were alive after it had ended.

    They may end by themselves for ``patience`` seconds, then get SIGTERM, then SIGKILL.
    """
    if not _LINUX:
        process.terminate()  # of no effect once it has ended
        process.wait()
        return []
    left: dict[int, str] = {}
    ended = process.poll() is not None
    for number, seconds in ((0, patience), (signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        end = time.monotonic() + seconds
        asked: set[int] = set()
        while alive := _of_run(before):
            for pid in alive:
                if ended and number:
                    left.setdefault(pid, _name(pid))
                # A process that appears now is one that another has just started.
                if number == signal.SIGKILL or (number and pid not in asked):
                    asked.add(pid)
                    with suppress(ProcessLookupError):
                        os.kill(pid, number)
            _reap(process, before)
            if time.monotonic() >= end:
                break
            time.sleep(0.05)
    process.wait()
    _reap(process, before)
    return [f"pid {pid} ({name})" for pid, name in left.items()]


def _of_run(before: set[int]) -> list[int]:
    """What is alive below us, without the children we had before and what is below them."""
    others = {pid for child in before for pid in (child, *descendants(child))}
    return [pid for pid in descendants(os.getpid()) if pid not in others]


def _reap(process: subprocess.Popen[str], before: set[int]) -> None:
    """Collect adopted processes that have ended; Popen collects its own."""
    process.poll()
    for pid in _children(os.getpid()):
        if pid != process.pid and pid not in before:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def _children(pid: int) -> list[int]:
    return [child for child, (_, parent) in _processes().items() if parent == pid]


def _processes() -> dict[int, tuple[str, int]]:
    """State letter and parent of every process, by pid."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue  # ended meanwhile
        state, parent = text[text.rindex(")") + 2 :].split()[:2]
        found[int(path.parent.name)] = state, int(parent)
    return found


def _name(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    return " ".join(words).strip()[:80]


def _how(code: int, workers: Sequence[tuple[int, int]]) -> str:
    if code == 0:
        return "finished"
    if code < 0:
        return f"runner killed by {signal_name(-code)}"
    for worker_code, rank in workers:
        if worker_code < 0:
            return f"worker of rank {rank} killed by {signal_name(-worker_code)}"
        return f"failed: worker of rank {rank}, exit code {worker_code}"
    return f"failed: exit code {code}"


@contextmanager
def _adopting() -> Iterator[None]:
    """Be the parent of every descendant whose own parent dies."""
    if not _LINUX:
        yield
        return
    was = ctypes.c_int()
    _LIBC.prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(was), 0, 0, 0)
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, was.value, 0, 0, 0)
