"""One run's folder: whose it is, and what it holds. (Who may write to it: :mod:`.run_lock`.)"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk, run_lock, seal
from algoperf_shampoo.harness.record import write_json

_RECORD = "run.json"
ENDED = ("finished", "diverged")
"""The values of ``status`` in the record of a run that is over."""


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """The content of ``run.json``, None if the folder has none.

    Raises:
        UserError: the file is not what this harness writes.
    """
    path = run_dir / _RECORD
    try:
        with disk.explained(path):
            if path.exists() and not path.is_file():  # opening a pipe would block for ever
                raise UserError(f"{path}: is no regular file; remove it, or set OUT=")
            record = json.loads(path.read_bytes())
    except disk.DiskError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}); remove the folder or set OUT="
        ) from None
    if not isinstance(record, dict) or "identity" not in record:
        raise UserError(f"{path}: not the record of an embedded run; set OUT= to another folder")
    return record


def write_record(run_dir: Path, record: dict[str, Any], sync_name: bool = True) -> None:
    """Replace ``run.json``, with its own digest (:mod:`.seal`), which ``record`` is given too."""
    record[seal.RECORD] = seal.digest(record)
    write_json(run_dir / _RECORD, record, sync_name)


def check(run_dir: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The folder's record if it is of this very run, None if the folder is new. Writes nothing.

    Raises:
        UserError: the folder holds another run, or something that is no run, or a run that is not
            over and cannot be written to.
    """
    check_names(run_dir)
    record = read_record(run_dir)
    if record is None:
        if run_dir.is_dir() and any(path.name[0] != "." for path in run_dir.iterdir()):
            raise UserError(
                f"{run_dir}: holds files but no {_RECORD}: not a run of the embedded harness; "
                "set OUT= to another folder"
            )
        check_writable(run_dir)
        return None
    difference = _first_difference(record["identity"], json.loads(json.dumps(identity)))
    if difference:
        key, there, here = difference
        raise UserError(
            f"{run_dir}: holds another run: {key} is {_short(there)} there and {_short(here)} "
            "now; set OUT= to another folder, or remove this one"
        )
    if record.get("status") not in ENDED:
        check_writable(run_dir)
    return record


def check_names(run_dir: Path) -> None:
    """Whether the path can be a folder. Writes nothing.

    Raises:
        UserError: a part of the path is too long, a file, or a symbolic link to nothing.
    """
    for path in (*reversed(run_dir.parents), run_dir):
        with disk.explained(path):
            if path.is_symlink() and not path.exists():
                raise UserError(
                    f"{path}: a symbolic link to {os.readlink(path)}, which is not there; "
                    "remove it, or set OUT= to another folder"
                )
            if path.exists() and not path.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if (run_dir / run_lock.LOCK).is_dir():
        with disk.explained(run_dir / run_lock.LOCK):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def check_writable(run_dir: Path) -> None:
    """Whether the folder, or the first one above it that is there, can be written to.

    Raises:
        DiskError: it cannot.
    """
    there = next(path for path in (run_dir, *run_dir.parents) if path.is_dir())
    with disk.explained(there):
        if not os.access(there, os.W_OK | os.X_OK):
            read_only = os.statvfs(there).f_flag & os.ST_RDONLY
            code = errno.EROFS if read_only else errno.EACCES
            raise OSError(code, os.strerror(code))


def verify(run_dir: Path, lock: int) -> None:
    """See that a folder is still the one that was locked, ``lock`` the descriptor of its lock.

    Raises:
        DiskError: it was deleted or moved; what is there now, if anything, is not ours.
    """
    own = os.fstat(lock)
    with disk.explained(run_dir):
        try:
            there = os.stat(run_dir / run_lock.LOCK)
        except (FileNotFoundError, NotADirectoryError):
            there = None
        if there is None or (there.st_ino, there.st_dev) != (own.st_ino, own.st_dev):
            raise FileNotFoundError(errno.ENOENT, "not the folder that the run began in")


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(name for name in old if name not in new)]:
            where = f"{key}.{name}" if key else name
            if name not in old or name not in new:
                return where, old.get(name, "absent"), new.get(name, "absent")
            difference = _first_difference(old[name], new[name], where)
            if difference:
                return difference
        return None
    return None if old == new else (key, old, new)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:16] + "..."
