"""The lock of a run's folder: held by every process of the run, free when the last one is gone.

The lock is a ``flock`` on the folder's ``.lock``. It belongs to the open file, not to a process:
whoever inherits the descriptor holds it too, so a run's processes get it as their standard input
(torch elastic closes every other descriptor) and no second writer can start beside one of them.
The kernel lets go of it when the last of them has ended, whatever ended it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk

LOCK = ".lock"
PATIENCE = 120.0
"""Seconds to wait for leftovers of a launch that is over; a lease of NFS version 4 is 90."""


@dataclass(frozen=True)
class Holder:
    """A process of this machine that holds a lock."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.command})"


@contextmanager
def hold(
    run_dir: Path, patience: float = PATIENCE, echo: Callable[[str], None] = print
) -> Iterator[int]:
    """Hold the folder; the descriptor, for processes that are to hold it too.

    A launch that is under way is not waited for. What one that was killed has left behind is, up to
    ``patience`` seconds, for it is about to end.

    Raises:
        UserError: another launch is writing to the folder, or leftovers do not end; who they are.
            The folder cannot be written to.
    """
    disk.make_folders(run_dir)
    path = run_dir / LOCK
    with disk.explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _take(descriptor, path, patience, echo)
        # Written through this open file, whose position is then its end: as a standard input it
        # gives nothing to read.
        with disk.explained(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(_me()).encode() + b"\n")
        for leftover in run_dir.glob(".*.tmp"):  # of a kill in the middle of a write
            disk.remove(leftover)
        yield descriptor
    finally:
        os.close(descriptor)


def held(run_dir: Path) -> bool:
    """Whether some process holds the folder now, on this machine or (NFS) on another."""
    try:
        descriptor = os.open(run_dir / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holders(path: Path) -> list[Holder]:
    """Processes of this machine that hold the lock on ``path``, as far as we may look into them.

    Empty where there is no ``/proc``.
    """
    try:
        there = path.stat()
    except OSError:
        return []
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            descriptors = list((process / "fd").iterdir())
        except OSError:
            continue  # another user's, or ended meanwhile
        for descriptor in descriptors:
            try:
                same = os.path.samestat(descriptor.stat(), there)
                # A process may have the file open and wait for the lock.
                if same and "FLOCK" in (process / "fdinfo" / descriptor.name).read_text():
                    found.append(Holder(int(process.name), _command(process)))
                    break
            except OSError:
                continue
    return sorted(found, key=lambda holder: holder.pid)


def process_start(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none.

    With the pid it names a process for good: pids are used again, pairs are not.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    after_name = text[text.rindex(")") + 2 :].split()  # the name may hold spaces and brackets
    return None if after_name[0] in "ZX" else int(after_name[19])


def boot_id() -> str | None:
    """Name of this machine's present boot (Linux), None if it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _take(descriptor: int, path: Path, patience: float, echo: Callable[[str], None]) -> None:
    end, told = time.monotonic() + patience, False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            launch = _read(path)
        except OSError as error:  # a file system without locks, say
            with disk.explained(path):
                raise error
        here = launch.get("host") == socket.gethostname()
        if here and _alive(launch):
            holder = Holder(launch["pid"], _command(Path(f"/proc/{launch['pid']}")))
            raise UserError(
                f"{path.parent}: another process is writing this run: {holder}; wait for it, or "
                "set OUT="
            )
        who = ", ".join(map(str, holders(path))) or _elsewhere(launch)
        if time.monotonic() >= end:
            raise UserError(
                f"{path.parent}: another process is writing this run: {who}; it was left behind by "
                "a launch that is over: end it, or set OUT="
            )
        if not told:
            echo(f"{path.parent}: held by {who}, left behind by a launch that is over; waiting")
            told = True
        time.sleep(0.2)


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "start": process_start(os.getpid()),
        "boot": boot_id(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def _read(path: Path) -> dict[str, Any]:
    """What the holder wrote; empty if it has not yet."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _alive(launch: dict[str, Any]) -> bool:
    if not launch:
        return False
    if launch.get("start") is None:  # no /proc: a process with this pid is all that can be asked
        try:
            os.kill(launch["pid"], 0)
        except OSError:
            return False
        return launch.get("boot") == boot_id()
    return launch.get("boot") == boot_id() and process_start(launch["pid"]) == launch["start"]


def _elsewhere(launch: dict[str, Any]) -> str:
    job = f", Slurm job {launch['slurm_job']}" if launch.get("slurm_job") else ""
    return f"pid {launch.get('pid', '?')} on {launch.get('host', 'another machine')}{job}"


def _command(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    text = " ".join(" ".join(words).split())  # on one line
    return text if len(text) <= 80 else text[:77] + "..."
