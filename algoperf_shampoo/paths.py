"""Paths as a user gives them, and what the system says of them, in one line."""

from __future__ import annotations

import errno
from pathlib import Path

from algoperf_shampoo.errors import UserError

_REMEDIES = {
    errno.ENOSPC: "make room there, or name another folder; the same command then goes on",
    errno.EDQUOT: "make room there, or name another folder; the same command then goes on",
    errno.EROFS: "it can be read only: name another folder (OUT=, TABLE=)",
    errno.EACCES: "it is not yours to use: name another folder (OUT=, TABLE=)",
    errno.EPERM: "it is not yours to use: name another folder (OUT=, TABLE=)",
    errno.ENAMETOOLONG: "a name in it is longer than the file system takes: name a shorter one",
    errno.ELOOP: "its links lead in a circle: name another folder",
    errno.ENOENT: "it is gone, or a link in it leads nowhere",
    errno.EEXIST: "something else is there already, or a link that leads nowhere",
    errno.ENOTDIR: "a part of it is a file: name another folder",
    errno.EISDIR: "a folder is where a file would be: move it away",
    errno.EIO: "the disk fails: name another folder, or mend it; the same command then goes on",
    errno.ESTALE: "it was deleted on the server; the same command goes on with what is left",
    errno.ENOLCK: "files cannot be locked there: name another folder",
    errno.ENOTSUP: "the file system cannot do that: name another folder",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
}


def given(word: str, text: str, root: Path) -> Path:
    """The path in a word of the command line: ``~`` expanded, relative ones below ``root``.

    Raises:
        UserError: ``~name`` of no user here.
    """
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{word}={text}: no home folder of that name here") from None
    return path if path.is_absolute() else root / path


def listed(word: str, text: str, root: Path) -> list[Path]:
    """The folders in a word of the command line, between commas; one whose name has a comma alone.

    Raises:
        UserError: nothing between two commas, or ``~name`` of no user here.
    """
    whole = given(word, text, root)
    names = [text] if text.strip() and _is_dir(whole) else text.split(",")
    if not all(name.strip() for name in names):
        raise UserError(
            f"{word}={text}: an empty name {'between commas' if ',' in text else 'of a folder'}; "
            f"folders are listed as {word}=one,two"
        )
    return [given(word, name, root) for name in names]


def complaint(error: OSError) -> str:
    """One line on an error of the system: the path, what is wrong, and what to do."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    what = error.strerror or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0)
    return ": ".join([*names[:1], what] + ([remedy] if remedy else []))


def shown(path: Path, root: Path) -> str:
    """The path as a user would type it in ``root``."""
    return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a null character
        return False
