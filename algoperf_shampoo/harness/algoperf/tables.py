"""The CSVs that AlgoPerf's runner wrote, brought to the state of the checkpoint that is resumed.

The runner writes each file anew at every row, not atomically, and appends to whatever it finds. So
a kill or a power cut can leave a file short, empty or torn, and rows of steps that come again.
Before a launch the evaluations are compared with those in the checkpoint, and put back from there.
Nothing is deleted: what is in the way is set aside.
"""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

from algoperf_shampoo import factor_log
from algoperf_shampoo.harness import disk

EVALS, MEASUREMENTS = "eval_measurements.csv", "measurements.csv"
_CLOSE = 1e-6  # the runner reads its rows back with pandas, which rounds
Row = list[str]


def bring_to(run_dir: Path, checkpoint: dict[str, Any] | None) -> list[str]:
    """Make the CSVs fit the checkpoint's facts (:func:`.probe.checkpoint`); lines to tell.

    Raises:
        DiskError: a file cannot be read or written.
    """
    step = checkpoint["global_step"] if checkpoint else 0
    evaluations = checkpoint["eval_results"] if checkpoint else []
    notes = []
    # The submission's own file it brings to the checkpoint itself; without one nothing is left.
    for name in (MEASUREMENTS, EVALS, factor_log.NAME):
        path = run_dir / name
        header, rows = read(path)
        kept = [row for row in rows if _step(header, row) <= step]
        late = sum(1 for row in rows if _step(header, row) > step)
        torn = len(rows) - len(kept) - late
        put_back = 0
        if name == EVALS:
            header, kept, put_back = _with_all(header, kept, evaluations, checkpoint)
        if kept == rows and (path.exists() or not rows):
            continue
        if path.exists():
            disk.set_aside(path)
        if kept:
            disk.write_atomically(path, _as_csv([header, *kept]))
        parts = []
        if late:
            parts.append(f"{late} rows after step {step} set aside, they come again")
        if torn:
            parts.append(f"{torn} rows that cannot be read set aside")
        if put_back:
            parts.append(f"{put_back} rows lost or changed, put back from the checkpoint")
        notes.append(f"{name}: {'; '.join(parts) or 'set aside'}")
    return notes


def last_evaluation(run_dir: Path) -> tuple[int, int, float]:
    """How many evaluations the CSV has; step and submission time in seconds of the last."""
    header, rows = read(run_dir / EVALS)
    whole = [row for row in rows if not math.isnan(_step(header, row))]
    if not whole:
        return 0, 0, 0.0
    spent = [_number(header, row, "accumulated_submission_time") for row in whole]
    known = [value for value in spent if math.isfinite(value)]
    return len(whole), int(_step(header, whole[-1])), max(known, default=0.0)


def read(path: Path) -> tuple[Row, list[Row]]:
    """Header and rows as text; empty where there is no file, or none that is a CSV.

    Raises:
        DiskError: it cannot be read.
    """
    with disk.explained(path):
        data = path.read_bytes() if path.exists() else b""
    try:
        lines = list(csv.reader(io.StringIO(data.decode(), newline="")))
    except (UnicodeDecodeError, csv.Error):
        return [], [[""]] if data else []
    lines = [line for line in lines if line]
    return (lines[0], lines[1:]) if lines else ([], [])


def _with_all(
    header: Row, rows: list[Row], evaluations: list[Any], checkpoint: dict[str, Any] | None
) -> tuple[Row, list[Row], int]:
    """The row of every evaluation, from the file where it agrees; how many are not from there."""
    wanted = sorted({key for _, result in evaluations for key in result})
    if any(name not in header for name in wanted):
        header = sorted({*wanted, "global_step", "preemption_count"})
        rows = []
    found, put_back = [], 0
    for step, result in evaluations:
        same = [row for row in rows if _agrees(header, row, step, result)]
        if same:
            found.append(same[-1])
            continue
        put_back += 1
        preempted = checkpoint["preemption_count"] if checkpoint else 0
        values = {**result, "global_step": step, "preemption_count": preempted}
        found.append([repr(values[name]) if name in values else "" for name in header])
    return header, found, put_back


def _agrees(header: Row, row: Row, step: int, result: dict[str, float]) -> bool:
    return _step(header, row) == step and all(
        math.isclose(_number(header, row, key), value, rel_tol=_CLOSE)
        or (math.isnan(value) and not math.isfinite(_number(header, row, key)))
        for key, value in result.items()
    )


def _step(header: Row, row: Row) -> float:
    """The row's step; NaN, which compares as false, if the row is torn."""
    step = _number(header, row, "global_step")
    return step if len(row) == len(header) and step >= 0 else math.nan


def _number(header: Row, row: Row, name: str) -> float:
    try:
        return float(row[header.index(name)])
    except (ValueError, IndexError):
        return math.nan


def _as_csv(lines: list[Row]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
