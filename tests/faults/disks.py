"""Disks that fail: a recorder of what is durable, and an injector of errors and kills.

Both stand in for the ``os`` that :mod:`algoperf_shampoo.harness.disk` writes through.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from algoperf_shampoo.harness import disk

WRITES = ("open", "write", "ftruncate", "fsync", "replace", "unlink", "mkdir")
"""The calls that change a folder, or make a change last."""


@contextlib.contextmanager
def standing_in(stand_in: Any) -> Iterator[None]:
    """Let :mod:`.disk` use ``stand_in`` for ``os``."""
    disk.os = stand_in  # type: ignore[attr-defined]
    try:
        yield
    finally:
        disk.os = os  # type: ignore[attr-defined]


class NoSync:
    """``os`` without the waiting: for runs whose durability is not looked at."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, descriptor: int) -> None:
        pass


class Failing:
    """``os`` whose n-th call that writes fails, or is the process's last.

    Args:
        at: which call, from 0; counted over :data:`WRITES` but for opening to read.
        code: the errno it fails with; None: SIGKILL. A write has half of its data written first.
    """

    def __init__(self, at: int, code: int | None = errno.ENOSPC) -> None:
        self.at, self.code, self.count = at, code, 0
        self.failed: str | None = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in WRITES:
            return real

        def call(*arguments: Any, **keywords: Any) -> Any:
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*arguments, **keywords)
            self.count += 1
            if self.count == self.at + 1:
                self.failed = f"{name} {arguments[0]}"
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                if self.code is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(self.code or 0, os.strerror(self.code or 0), str(arguments[0]))
            # Nobody waits for a disk here: what a process has written outlives it anyway.
            return None if name == "fsync" else real(*arguments, **keywords)

        return call


@dataclass
class _Inode:
    now: bytes = b""
    durable: bytes = b""


@dataclass
class Image:
    """What a power cut leaves: files by path below the root, None for folders."""

    files: dict[str, bytes | None]
    saved_step: int | None
    """The step of the last checkpoint that the run believed to be safe."""
    after: str
    """The call that the cut came after."""

    def restore(self, root: Path) -> None:
        """Make the folder."""
        root.mkdir(parents=True)
        for name, data in sorted(self.files.items()):
            if data is None:
                (root / name).mkdir(exist_ok=True)
            else:
                (root / name).write_bytes(data)


@dataclass
class Recorder:
    """``os`` that keeps account of what would survive a power cut, below ``root``.

    A file's data are durable after its fsync, a name (new, renamed, removed) after the fsync of its
    folder. After each fsync two folders are kept: with every name that is not durable lost, and
    with every name kept but the data that are not durable lost. (A real disk does something
    between the two.)
    """

    root: Path
    honest: Callable[[str, Path], bool] = lambda kind, path: True
    """Whether an fsync of a "file" or "folder" has its effect; else the disk lies."""
    saved_step: Callable[[], int | None] = lambda: None
    images: list[Image] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._now: dict[str, _Inode | None] = {}
        self._open: dict[int, _Inode | Path] = {}
        for path in sorted(self.root.rglob("*")):
            data = None if path.is_dir() else path.read_bytes()
            self._now[self._name(path)] = None if data is None else _Inode(data, data)
        self._durable = dict(self._now)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        descriptor = os.open(path, flags, mode)
        if flags & os.O_DIRECTORY:
            self._open[descriptor] = Path(path)
            return descriptor
        inode = self._now.setdefault(self._name(path), _Inode())
        assert inode is not None
        if flags & os.O_TRUNC:
            inode.now = b""
        self._open[descriptor] = inode
        return descriptor

    def close(self, descriptor: int) -> None:
        del self._open[descriptor]
        os.close(descriptor)

    def write(self, descriptor: int, data: Any) -> int:
        count = os.write(descriptor, data)
        inode = self._open[descriptor]
        assert isinstance(inode, _Inode)
        inode.now += bytes(data)[:count]  # all of ours append, or fill an empty file
        return count

    def ftruncate(self, descriptor: int, size: int) -> None:
        os.ftruncate(descriptor, size)
        inode = self._open[descriptor]
        assert isinstance(inode, _Inode)
        inode.now = inode.now[:size]

    def replace(self, source: Any, target: Any) -> None:
        os.replace(source, target)
        self._now[self._name(target)] = self._now.pop(self._name(source))

    def unlink(self, path: Any) -> None:
        os.unlink(path)
        self._now.pop(self._name(path))

    def mkdir(self, path: Any) -> None:
        os.mkdir(path)
        self._now[self._name(path)] = None

    def fsync(self, descriptor: int) -> None:
        what = self._open[descriptor]
        if isinstance(what, _Inode):
            name = next(n for n, inode in self._now.items() if inode is what)
            if self.honest("file", Path(name)):
                what.durable = what.now
        else:
            name = self._name(what)
            if self.honest("folder", what):
                inside = [n for n in {*self._now, *self._durable} if _parent(n) == name]
                for n in inside:
                    self._durable.pop(n, None)
                    if n in self._now:
                        self._durable[n] = self._now[n]
        for names in (self._durable, self._now):
            self.images.append(Image(self._left(names), self.saved_step(), f"fsync of {name}"))

    def _left(self, names: dict[str, _Inode | None]) -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        for name in sorted(names):  # folders before what is in them
            if _parent(name) in ("", ".") or _parent(name) in found:
                inode = names[name]
                found[name] = None if inode is None else inode.durable
        return found

    def _name(self, path: Any) -> str:
        return Path(path).relative_to(self.root).as_posix()


def _parent(name: str) -> str:
    return "" if name == "." else Path(name).parent.as_posix()
