"""Writing files so that what was written is still there after a kill, a full disk or a power cut.

A file is on disk after its fsync, its name after the fsync of its folder. Every write of a run goes
through here, so that each has both, and each failure is one line that says what to do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError


class DiskError(UserError):
    """A file or folder cannot be read or written; the message says which, why, and what to do."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a :class:`DiskError` about ``path``."""
    try:
        yield
    except OSError as error:
        named = OSError(error.errno, error.strerror or str(error), str(path))
        raise DiskError(paths.complaint(named)) from error


def write_atomically(path: Path, data: bytes, sync_name: bool = True) -> None:
    """Write a file whole or not at all: under a temporary name, to disk, then renamed into place.

    Args:
        sync_name: whether the name is on disk too on return; else :func:`sync_folder` is to follow.

    Raises:
        DiskError: it cannot be written; a file that was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with explained(path):
        try:
            _write(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, data)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):  # the space is needed
                os.unlink(temporary)
            raise
    if sync_name:
        sync_folder(path.parent)


def write_together(contents: dict[Path, bytes]) -> None:
    """Write files of one kind, all or none: under temporary names, to disk, then all renamed.

    Raises:
        DiskError: one cannot be written; then those that were there are as they were.
    """
    temporaries = {path: path.with_name(f".{path.name}.tmp") for path in contents}
    try:
        for path, data in contents.items():
            with explained(path):
                if path.is_dir():  # known before the first is renamed
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                _write(temporaries[path], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, data)
        for path, temporary in temporaries.items():
            with explained(path):
                os.replace(temporary, path)
    except DiskError:
        for temporary in temporaries.values():
            with suppress(OSError):  # the space is needed
                os.unlink(temporary)
        raise
    for folder in dict.fromkeys(path.parent for path in contents):
        sync_folder(folder)


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file that is there, to disk.

    Raises:
        DiskError: it is gone, or cannot be written; part of ``data`` may have been added.
    """
    with explained(path):
        _write(path, os.O_WRONLY | os.O_APPEND, data)


def cut(path: Path, size: int) -> None:
    """Shorten a file to ``size`` bytes, on disk.

    Raises:
        DiskError: it cannot be written.
    """
    with explained(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Delete a file if it is there. A power cut may bring it back.

    Raises:
        DiskError: it cannot be deleted.
    """
    with explained(path), suppress(FileNotFoundError):
        os.unlink(path)


def set_aside(path: Path) -> Path:
    """Rename a file to ``set_aside_N_NAME`` with the first N that is free; the new path.

    Raises:
        DiskError: it cannot be renamed.
    """
    number = 1
    with explained(path):
        while os.path.lexists(target := path.with_name(f"set_aside_{number}_{path.name}")):
            number += 1
        os.replace(path, target)
    sync_folder(path.parent)
    return target


def make_folders(path: Path) -> None:
    """Make a folder and the folders above it that are missing, their names on disk.

    Raises:
        DiskError: one cannot be made.
    """
    missing = []
    with explained(path):
        while not path.is_dir():
            missing.append(path)
            path = path.parent
    for folder in reversed(missing):
        with explained(folder), suppress(FileExistsError):
            os.mkdir(folder)
        with explained(folder):
            if not folder.is_dir():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Bring a file that another process has written to disk, if it is there.

    Raises:
        DiskError: the disk fails.
    """
    with explained(path), suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to disk.

    Raises:
        DiskError: the folder is gone, or the disk fails.
    """
    with explained(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has no such thing for folders
                raise
        finally:
            os.close(descriptor)


def _write(path: Path, flags: int, data: bytes) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
