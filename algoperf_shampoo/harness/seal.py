"""Seals: what a run has measured, as sizes and digests, so that any loss or change is seen.

A run's record (``run.json`` of the embedded harness; ``seal.json`` of a run of AlgoPerf's, written
when its runner was seen to end) holds

* ``files``: for each file of :data:`PATTERNS`, ``{"bytes": n, "rows": r, "sha256": hex}``, where
  the digest is of the first n bytes and r the number of data rows of a CSV, None for a JSON;
* ``record_sha256``: the digest of the record itself, in canonical JSON, without that key.

A record without either is of a log without a digest. This module needs the standard library alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import stat
from pathlib import Path
from typing import Any

NAME = "seal.json"
"""File name of the record of a run under AlgoPerf's harness."""

FILES, RECORD = "files", "record_sha256"
PATTERNS = (
    "eval_measurements.csv",
    "measurements.csv",
    "step_losses.csv",
    "factors.csv",
    "hparams.json",
    "meta_data_*.json",
    "flags_*.json",
)


def make(folder: Path) -> dict[str, dict[str, Any]]:
    """The ``files`` of a record: every file of :data:`PATTERNS` in ``folder``, as it is now.

    Raises:
        OSError: a file cannot be read.
    """
    return {name: entry((folder / name).read_bytes(), name) for name in sorted(present(folder))}


def entry(data: bytes, name: str) -> dict[str, Any]:
    """Size, rows and digest of a file's content."""
    rows = count_rows(data) if name.endswith(".csv") else None
    return {"bytes": len(data), "rows": rows, "sha256": hashlib.sha256(data).hexdigest()}


def count_rows(data: bytes) -> int:
    """Records of a CSV after its header; empty lines do not count."""
    text = io.StringIO(data.decode("utf-8", errors="replace"), newline="")
    limit = csv.field_size_limit(max(csv.field_size_limit(), len(data) + 1))
    try:
        return max(0, sum(1 for row in csv.reader(text) if row) - 1)
    finally:
        csv.field_size_limit(limit)


def signed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the digest of itself, to be written as it is.

    Raises:
        TypeError, ValueError: it cannot be written as JSON.
    """
    content = {key: value for key, value in record.items() if key != RECORD}
    return {**content, RECORD: digest(content)}


def digest(record: dict[str, Any]) -> str:
    """sha256 of a record without its own digest: JSON with sorted keys and no spaces."""
    content = {key: value for key, value in record.items() if key != RECORD}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def is_whole(record: dict[str, Any]) -> bool:
    """Whether a record is as it was written, by its own digest."""
    return isinstance(record.get(RECORD), str) and record[RECORD] == _digest_or_none(record)


def problems(folder: Path, record: dict[str, Any], ended: bool) -> list[str]:
    """What differs between a folder and its record; a reason each, the file's name first.

    Args:
        ended: the run is over, so the files must be just as they were sealed. Else rows that were
            written after the seal are as they should be.
    """
    if FILES not in record and RECORD not in record:
        return []
    if not is_whole(record):
        return ["the record has been changed since it was written: its own digest differs"]
    files = record.get(FILES)
    if files is None:
        return []
    if not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        return [f"the record's {FILES!r} is not a table of sizes and digests"]
    found = []
    for name, sealed in files.items():
        problem = _compare(folder, name, sealed, ended)
        if problem:
            found.append(f"{name}: {problem}")
    if ended:
        extra = sorted(set(present(folder)) - set(files))
        found += [f"{name}: is not of this run: it came after the end" for name in extra]
    return found


def _compare(folder: Path, name: str, sealed: dict[str, Any], ended: bool) -> str | None:
    if "/" in name or "\0" in name or not any(Path(name).match(pattern) for pattern in PATTERNS):
        return "is no file of a run"
    size = sealed["bytes"]
    try:
        if not stat.S_ISREG((folder / name).stat().st_mode):
            return "is no regular file"  # opening a pipe would block for ever
        with open(folder / name, "rb") as file:
            data = file.read(size)
            more = len(file.read(1)) > 0
    except OSError as error:
        return f"cannot be read ({error.strerror or error})" if size or ended else None
    if len(data) < size:
        lost = f"{size - len(data)} of its {size} bytes are gone"
        rows = sealed["rows"]
        if rows is None:
            return lost
        return f"{lost}: {min(rows, count_rows(data))} of {rows} rows are there"
    if hashlib.sha256(data).hexdigest() != sealed["sha256"]:
        return "has been changed since it was written"
    if ended and more:
        return "has been added to since the run ended"
    return None


def _is_entry(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and type(value.get("bytes")) is int
        and value["bytes"] >= 0
        and (value.get("rows") is None or type(value["rows"]) is int)
        and "rows" in value
        and isinstance(value.get("sha256"), str)
    )


def _digest_or_none(record: dict[str, Any]) -> str | None:
    try:
        return digest(record)
    except (TypeError, ValueError, RecursionError):
        return None


def present(folder: Path) -> set[str]:
    """Names of the files in a folder that a record seals."""
    return {path.name for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()}
