"""GPUs of this machine, and who has taken which: several runs get different ones by themselves.

A run holds a lock file per GPU while it lasts, named by the GPU's UUID, so that it does not matter
how a scheduler or a container numbers them. torch is not needed to look.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo.errors import UserError

_PATIENCE = 2.0  # seconds; whoever looks whether a GPU is free holds it for a moment
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Gpu:
    """``name`` is what ``CUDA_VISIBLE_DEVICES`` calls it, ``uuid`` what the driver does."""

    name: str
    uuid: str


def here() -> list[Gpu]:
    """The GPUs that a program started now would see; empty without NVIDIA's driver."""
    shown = os.environ.get(VISIBLE)
    if shown is not None and not shown.replace(",", ""):
        return []  # hidden: the driver need not be asked, which takes a second
    known = _driver()
    if shown is None:
        return [Gpu(index, uuid) for index, uuid in known.items()]
    names = [name for name in shown.split(",") if name]
    return [Gpu(name, _uuid(name, known)) for name in names if known]


def named(names: Sequence[str]) -> list[Gpu]:
    """GPUs by the names that ``CUDA_VISIBLE_DEVICES`` has for them."""
    known = _driver()
    return [Gpu(name, _uuid(name, known)) for name in names]


def free(gpus: Sequence[Gpu]) -> list[Gpu]:
    """Those that no run holds now."""
    found = []
    for gpu in gpus:
        with ExitStack() as stack:
            if _take(gpu, stack):
                found.append(gpu)
    return found


@contextmanager
def claim(gpus: Sequence[Gpu], count: int | None) -> Iterator[list[Gpu]]:
    """Hold ``count`` of these GPUs that are free (None: all that are), while the context lasts.

    Raises:
        UserError: fewer are free, or none.
    """
    with ExitStack() as stack:
        taken: list[Gpu] = []
        end = time.monotonic() + _PATIENCE
        while True:
            for gpu in gpus:
                if (count is None or len(taken) < count) and gpu not in taken and _take(gpu, stack):
                    taken.append(gpu)
            if len(taken) >= (count or 1) or time.monotonic() >= end:
                break
            time.sleep(0.05)
        if len(taken) < (count or 1):
            word = f"GPUS={count}" if count else "GPUS"
            raise UserError(
                f"{word}: {len(taken)} of {len(gpus)} GPUs here are free, the others are held by "
                "runs of this suite; wait for them"
            )
        yield sorted(taken, key=list(gpus).index)


def _take(gpu: Gpu, stack: ExitStack) -> bool:
    folder = Path(tempfile.gettempdir()) / "algoperf-shampoo-gpus"
    path = folder / re.sub(r"[^\w.-]", "_", gpu.uuid)
    before = os.umask(0)  # of other users too
    try:
        folder.mkdir(mode=0o1777, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    finally:
        os.umask(before)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return False
    stack.callback(os.close, descriptor)
    return True


def _driver() -> dict[str, str]:
    """UUIDs by index, as the driver lists them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, "--query-gpu=index,uuid", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        return {}
    pairs = [line.split(",") for line in done.stdout.splitlines()]
    return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}


def _uuid(name: str, known: dict[str, str]) -> str:
    return known.get(name) or next((u for u in known.values() if u.startswith(name)), name)
