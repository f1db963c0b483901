"""Whether this machine has the cores that a run on its CPU wants."""

from __future__ import annotations

import os


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float:
    """Processes that ran or waited for a core, over the last minute; 0 where it is not told."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def note(threads: int, cores: int, load: float) -> str | None:
    """One line if the threads of a run exceed the idle cores, None if they do not.

    Threads that wait for each other at every product lose far more than their share: two on a
    machine whose cores are taken need ten times as long, where one needs twice.
    """
    if threads > cores:
        return f"{threads} threads on {cores} cores: set OMP_NUM_THREADS={cores} or less"
    if threads <= max(0.0, cores - load) + 0.5:
        return None
    taken = f"the load is {load:.1f} on {cores} core{'s' * (cores > 1)}"
    fewer = "; OMP_NUM_THREADS=1 loses least" if threads > 1 else ""
    return f"this machine is busy ({taken}): steps stay the same, seconds do not count{fewer}"
