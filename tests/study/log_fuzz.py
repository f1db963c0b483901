"""Mutations of run folders, for the reader: every file it opens, by bytes, lines and values.

A mutation is a function of a ``random.Random`` and a file's content; :func:`walk` applies one after
another to folders of four kinds, reads each, puts it in a table in all forms, and counts what a
cell did. Nothing here is caught: an exception of the reader is the test's.
"""

from __future__ import annotations

import collections
import csv
import io
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from algoperf_shampoo.study import comparisons, logs, table_files, table_text, tables

ROOT = Path(__file__).parents[2]
CSV, META = "eval_measurements.csv", "meta_data_0.json"
ODD = [
    *("inf", "-inf", "nan", "NaN", "Infinity", "-1", "-0.0", "1_0", "\u0661\u0660", "\u00b2"),
    *("1e400", "1e308", "-1e308", "", " ", " 1", "0x10", "1,5", '"', "'", "\0", "\r", "\ud800"),
    *("null", "true", "[]", "{}", '""', "[1]", '{"a": 1}', "9" * 400, "9" * 5000, "x" * 140_000),
    *("[" * 100_000, '{"a":' * 2000, "1e5", "0", "1", "1e-9", "=1+1", "\ufeff", "\u202e"),
]
_VALUE = re.compile(rb"[0-9][0-9.e+-]*")


def _place(r: random.Random, content: bytes) -> int:
    return r.randrange(len(content) + 1)


def _span(r: random.Random, content: bytes) -> tuple[int, int]:
    start = _place(r, content)
    return start, min(len(content), start + r.choice([1, 1, 2, 5, 20, 200]))


def _lines(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True) or [b""]


def flip_bytes(r: random.Random, content: bytes) -> bytes:
    """One to four bytes become others."""
    changed = bytearray(content or b"0")
    for _ in range(r.choice([1, 1, 1, 4])):
        changed[r.randrange(len(changed))] = r.randrange(256)
    return bytes(changed)


def insert_bytes(r: random.Random, content: bytes) -> bytes:
    """Random bytes in between."""
    at = _place(r, content)
    return content[:at] + r.randbytes(r.choice([1, 3, 50])) + content[at:]


def delete_span(r: random.Random, content: bytes) -> bytes:
    """Some bytes are gone."""
    start, end = _span(r, content)
    return content[:start] + content[end:]


def repeat_span(r: random.Random, content: bytes) -> bytes:
    """Some bytes are there twice."""
    start, end = _span(r, content)
    return content[:end] + content[start:end] + content[end:]


def truncate(r: random.Random, content: bytes) -> bytes:
    """The end is gone."""
    return content[: _place(r, content)]


def delete_line(r: random.Random, content: bytes) -> bytes:
    """One line is gone, often the last."""
    lines = _lines(content)
    del lines[r.choice([len(lines) - 1, r.randrange(len(lines))])]
    return b"".join(lines)


def repeat_line(r: random.Random, content: bytes) -> bytes:
    """One line is there again, further down or up."""
    lines = _lines(content)
    lines.insert(r.randrange(len(lines) + 1), r.choice(lines))
    return b"".join(lines)


def swap_lines(r: random.Random, content: bytes) -> bytes:
    """Two lines change places."""
    lines = _lines(content)
    a, b = r.randrange(len(lines)), r.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"".join(lines)


def odd_value(r: random.Random, content: bytes) -> bytes:
    """A number becomes something odd."""
    found = list(_VALUE.finditer(content))
    if not found:
        return insert_bytes(r, content)
    at = r.choice(found)
    odd = r.choice(ODD).encode("utf-8", "surrogatepass")
    return content[: at.start()] + odd + content[at.end() :]


def change_digit(r: random.Random, content: bytes) -> bytes:
    """A digit becomes another: legal in itself."""
    places = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
    if not places:
        return flip_bytes(r, content)
    at = r.choice(places)
    return content[:at] + str(r.randrange(10)).encode() + content[at + 1 :]


def change_json(r: random.Random, content: bytes) -> bytes:
    """A value of a JSON object, at any depth, becomes another, goes, or gets a new neighbour."""
    try:
        top = json.loads(content)
    except (ValueError, RecursionError):
        return odd_value(r, content)
    here = top
    while isinstance(here, dict) and here and r.random() < 0.7:
        key = r.choice(sorted(here))
        if not isinstance(here[key], dict):
            break
        here = here[key]
    if not isinstance(here, dict) or not here:
        return odd_value(r, content)
    values: list[Any] = [None, True, False, 0, 1, -1, 0.5, 10**400, float("nan"), float("inf")]
    values += ["", "x", "\ud800", "a\nb", "x" * 2000, [], [1], {}, {"a": {"b": [None]}}, 1e308]
    key = r.choice(sorted(here))
    deed = r.randrange(4)
    if deed == 0:
        del here[key]
    elif deed == 1:
        here[r.choice(["", "x", "\ud800", "tau", "class", "global_step"])] = r.choice(values)
    else:
        here[key] = r.choice(values)
    return json.dumps(top, indent=2).encode()


def everything(r: random.Random, content: bytes) -> bytes:
    """The whole file becomes something else."""
    odd = r.choice(ODD).encode("utf-8", "surrogatepass")
    return r.choice([b"", b"\n", odd, b"{}", b"[]", b"null", content * 2, content[::-1]])


MUTATIONS = [
    *(flip_bytes, insert_bytes, delete_span, repeat_span, truncate, delete_line, repeat_line),
    *(swap_lines, odd_value, change_digit, change_json, everything),
]


ENTRIES: dict[str, Callable[[Path], None]] = {
    "gone": lambda path: None,
    "folder": lambda path: path.mkdir(),
    "pipe": lambda path: os.mkfifo(path),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path),
}


@dataclass
class Tally:
    """What the mutations of one kind of folder did."""

    files: int = 0
    same: int = 0
    noted: int = 0
    """The cell may have changed, and a new line says why."""
    legal: collections.Counter[str] = field(default_factory=collections.Counter)
    """Another cell without a word, of a log that is legal all the same, by mutation."""
    silent: list[str] = field(default_factory=list)
    """Another cell without a word, of a log that breaks type, order or range."""


def cell(trial: logs.Trial) -> tuple[Any, ...]:
    """What a table makes of a trial: its row, and what it adds there."""
    point = json.dumps(trial.hparams, sort_keys=True)
    row = (trial.label, trial.workload, trial.framework, trial.version, point)
    return (*row, trial.outcome, trial.steps_to_target, trial.time_to_target)


def walk(folder: Path, names: list[str], count: int, seed: int) -> Tally:
    """Mutate files of a trial folder, one at a time, ``count`` times; the folder ends as it was.

    Raises:
        AssertionError: a trial that is not counted says nothing, or a table cannot be written.
    """
    r = random.Random(seed)
    tally = Tally()
    before = logs.read_trial(folder)
    assert before.holes == [], before.holes
    for _ in range(count):
        name = r.choice(names)
        path = folder / name
        content = path.read_bytes()
        if r.random() < 0.03:
            deed = r.choice(sorted(ENTRIES))
            path.unlink()
            ENTRIES[deed](path)
            mutated = b""
        else:
            mutation = r.choice(MUTATIONS)
            deed, mutated = mutation.__name__, mutation(r, content)
            path.write_bytes(mutated)
        trial = logs.read_trial(folder)
        _check(trial)
        tally.files += 1
        if cell(trial) == cell(before):
            tally.same += 1
        elif trial.holes != before.holes:
            tally.noted += 1
        elif _legal(name, content, mutated, str(before.metric)):
            tally.legal[f"{name}: {deed}"] += 1
        else:
            tally.silent.append(f"{name}: {deed}: {cell(before)} became {cell(trial)}")
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(content)
    assert logs.read_trial(folder).holes == []
    return tally


def _check(trial: logs.Trial) -> None:
    assert trial.outcome in ("hit", "miss", "unfinished", "unknown")
    assert trial.outcome != "unknown" or trial.holes
    assert (trial.steps_to_target is None) == (trial.outcome != "hit")
    assert all(hole.isprintable() for hole in trial.holes)
    made = comparisons.annotate(tables.table1([trial], ROOT))
    json.loads(table_files.to_json(made), parse_constant=_refuse)
    for text in (
        table_files.to_csv(made),
        table_files.to_markdown(made),
        *map(table_text.render, made),
    ):
        text.encode("utf-8")


def _refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def _legal(name: str, before: bytes, after: bytes, metric: str) -> bool:
    if name.endswith(".json"):
        return _legal_json(before, after)
    return name == CSV and _legal_csv(after, metric)


def _legal_csv(content: bytes, metric: str) -> bool:
    """Type, order and range, once more and otherwise than in the reader: text compared as text."""
    text = content.decode("utf-8", "replace")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if not text.endswith("\n") or any(len(row) != len(rows[0]) for row in rows) or len(rows) < 2:
        return False
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
    steps, times = columns.get("global_step", []), columns.get("accumulated_submission_time", [])
    values = columns.get(f"validation/{metric}", [])
    plain = re.compile(r"[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?", re.ASCII)
    signed = re.compile(r"|[+-]?(nan|inf|infinity|[0-9]*\.?[0-9]*(e[+-]?[0-9]+)?)", re.ASCII | re.I)
    if not (all(map(plain.fullmatch, steps + times)) and all(map(signed.fullmatch, values))):
        return False
    at, spent = [float(s) for s in steps], [float(t) for t in times]
    order = at[0] <= 1 and all(a < b for a, b in zip(at, at[1:], strict=False))
    order &= all(a <= b for a, b in zip(spent, spent[1:], strict=False)) and max(spent) < 1e9
    numbers = [float(v) for v in values if v]
    return bool(order and all(abs(v) <= 1 or not math.isfinite(v) for v in numbers))


def _legal_json(before: bytes, after: bytes) -> bool:
    """Whether what a cell is made of is still there, of the same JSON types, and finite."""
    try:
        one, two = json.loads(before), json.loads(after)
    except (ValueError, RecursionError):
        return False
    if not isinstance(two, dict) or "workload.validation_target_value" not in one:
        return isinstance(two, dict)  # a point or flags: any object of finite values is legal
    keys = ("workload.target_metric_name", "workload.validation_target_value")
    keys += ("workload.step_hint", "workload.max_allowed_runtime_sec")
    return all(_kind(one.get(key)) == _kind(two.get(key)) for key in keys)


def _kind(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return "number" if number else type(value).__name__


def copies(sources: list[Path], to: Path) -> Iterator[Path]:
    """Copies of trial folders with the folders that name them, each in one of its own."""
    for number, source in enumerate(sources):
        place = source.parents[3]
        target = to / str(number) / source.relative_to(place)
        shutil.copytree(source, target)
        yield target
