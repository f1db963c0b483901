"""JSON files that people write: read whole or refused in one line, whatever is in them.

Python's reader takes more than JSON (NaN, Infinity, names that are there twice) and fails in its
own ways on deep nesting, long numbers and bytes that are no text.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from algoperf_shampoo import points
from algoperf_shampoo.errors import UserError

MAX_BYTES = 1 << 20
MAX_DIGITS = 300
"""Of an integer, so that it is a float as well."""


def read(path: Path, what: str = "file") -> Any:
    """The value in ``path``.

    Args:
        what: what the file is, for the message that it is not there.

    Raises:
        UserError: there is no such file, it is a folder, a device or a pipe, it is larger than
            :data:`MAX_BYTES`, or it is not JSON in UTF-8.
    """
    text = _text(path, what)
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=_integer,
        )
    except RecursionError as error:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error


def check_keys(value: Any, known: set[str], needed: set[str], where: str) -> None:
    """
    Args:
        where: of the value, for the message.

    Raises:
        UserError: it is no object, has a key that is not ``known``, or lacks one that is needed.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where}: not an object with {', '.join(sorted(known))}")
    for name in value:
        if name not in known:
            raise UserError(f"{where}: unknown key {name!r}: there is {', '.join(sorted(known))}")
    for name in sorted(needed - set(value)):
        raise UserError(f"{where}: no {name}")


def _text(path: Path, what: str) -> str:
    try:
        _check(path, path.stat(), what)
        # Should it have become a pipe meanwhile, it is not waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            _check(path, os.fstat(descriptor), what)
            return file.read(MAX_BYTES).decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such {what}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid JSON: byte {error.start} is not UTF-8") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: cannot be read as a {what}: {reason}") from error


def _check(path: Path, status: os.stat_result, what: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: a {_kind(status.st_mode)}: a {what} is an ordinary file")
    if status.st_size > MAX_BYTES:
        raise UserError(f"{path}: {status.st_size} bytes: a {what} is at most {MAX_BYTES}")


def _kind(mode: int) -> str:
    words = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    for test, word in words:
        if test(mode):
            return word
    return "device"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{json.dumps(twice)[:60]} is there twice in one object")
    return found


def _constant(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:40]} is larger than any number here (1.8e308)")
    if points.vanishes(text, value):
        raise ValueError(f"{text[:40]} is nearer to 0 than any number here (4.9e-324)")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)
