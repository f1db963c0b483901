"""Reading a file that anybody may have written: bounded, strict, and never a traceback.

Every fault is an :class:`Unreadable` whose text is the reason, without the file's name.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from algoperf_shampoo import points

MAX_CSV_BYTES = 64 * 2**20
MAX_JSON_BYTES = 16 * 2**20
MAX_COLUMNS = 10_000
MAX_DEPTH = 32
"""How deep the values of a JSON file may be nested: AlgoPerf's files are flat."""

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(?:nan|inf|infinity)", re.IGNORECASE | re.ASCII)


class Unreadable(Exception):
    """A file cannot be read, or is not what its name says; the text is the reason."""


class Missing(Unreadable):
    """There is no such file."""


def read_text(path: Path, limit: int) -> str:
    """The content of a regular file of at most ``limit`` bytes, as UTF-8.

    Nothing but a regular file is opened: a pipe would block for ever, a device may never end.

    Raises:
        Missing: no such file.
        Unreadable: no regular file, too large, not to be opened or read, not UTF-8.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Unreadable("is no regular file")
        # Should it become a pipe in between, the call returns at once all the same.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise Missing("there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        if isinstance(error, OSError) and error.errno == errno.ENOTDIR:
            raise Missing("there is no such file") from None
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unreadable(f"cannot be read: {reason}") from None
    if len(content) > limit:
        raise Unreadable(f"is larger than {limit} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise Unreadable(f"line {line} is not UTF-8 (byte {error.start})") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        Missing: no such file.
        Unreadable: not to be read, no JSON, no object, a key twice in an object, nested deeper than
            :data:`MAX_DEPTH`, or a number that no float64 holds.
    """
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise Unreadable(f"holds {_kind(content)}, not an object")
    return content


def read_json_value(path: Path) -> Any:
    """What a JSON file holds, be it an object or not.

    Raises:
        Missing, Unreadable: as :func:`read_json`.
    """
    text = read_text(path, MAX_JSON_BYTES)
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_float=_float)
    except RecursionError:
        raise Unreadable(f"is nested deeper than {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise Unreadable(f"is not valid JSON: line {error.lineno}: {error.msg}") from None
    except ValueError as error:  # an integer of thousands of digits
        raise Unreadable(f"is not valid JSON: {error}") from None
    _check_values(content)
    return content


def read_csv(path: Path) -> tuple[list[str], list[tuple[int, list[str]]], str | None]:
    """Header, rows with their line numbers, and what is wrong after these rows, if anything.

    Raises:
        Missing: no such file.
        Unreadable: not to be read, without a header, or with a column name twice.
    """
    text = read_text(path, MAX_CSV_BYTES)
    lines = _records(text)
    try:
        first = next(lines, None)
    except csv.Error as error:
        raise Unreadable(f"line 1: {error}") from None
    if first is None or not first[1]:
        raise Unreadable("has no header")
    header = first[1]
    if len(header) > MAX_COLUMNS:
        raise Unreadable(f"has {len(header)} columns")
    twice = sorted({name for name in header if header.count(name) > 1}) if header else []
    if twice:
        raise Unreadable(f"has the column {printable(twice[0])} twice")
    rows: list[tuple[int, list[str]]] = []
    number = first[0]
    try:
        for number, fields in lines:
            if len(fields) != len(header):
                many = f"{len(fields)} fields, the header has {len(header)}"
                return header, rows, f"line {number}: {many}"
            rows.append((number, fields))
    except csv.Error as error:
        return header, rows, f"line {number + 1}: {error}"
    if not text.endswith("\n"):
        return header, rows, f"line {number} is cut short: it does not end"
    return header, rows, None


def number(text: str) -> float | None:
    """The number that a CSV field states, nan for an empty field, None if it is no number.

    Stricter than ``float``: plain digits only, so neither ``1_0`` nor digits of other scripts nor
    spaces, nor a number nearer to 0 than any float64. "nan" and "inf" are numbers, as AlgoPerf
    writes them.
    """
    if not text:
        return math.nan
    if _NUMBER.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        value = float(text)
        return None if points.vanishes(text, value) else value
    return None


def finite(value: Any) -> float | None:
    """A value from a JSON file as a finite float, None if it is none (true and false are none)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number of more than 308 digits
        return None


def printable(text: str, most: int = 200) -> str:
    """Text for a terminal or a UTF-8 file: no control characters, no stray bytes, not too long."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def numbered(names: list[str], start: str) -> list[str]:
    """The names ``<start><digits>.json`` among some, by their numbers."""
    found = [(re.fullmatch(re.escape(start) + r"([0-9]+)\.json", name), name) for name in names]
    return [name for _, name in sorted((int(m[1]), name) for m, name in found if m)]


def _records(text: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    for fields in reader:
        yield reader.line_num, fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {printable(key, 80)!r} is there twice")
        made[key] = value
    return made


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value) or points.vanishes(text, value):
        raise Unreadable(f"holds {printable(text, 40)}, which no float64 does")
    return value


def _check_values(content: Any) -> None:
    """Raise Unreadable for what later arithmetic or printing could not stand."""
    left: list[tuple[Any, int]] = [(content, 1)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise Unreadable(f"is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            left += [(v, depth + 1) for v in value.values()]
        elif isinstance(value, list):
            left += [(v, depth + 1) for v in value]
        elif isinstance(value, int):
            try:
                float(value)
            except OverflowError:
                raise Unreadable(f"holds an integer of {len(str(value))} digits") from None


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
