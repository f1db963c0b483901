"""The files of a run folder: AlgoPerf's CSVs and JSONs, and the loss of every step."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from algoperf_shampoo import factor_log
from algoperf_shampoo.harness import disk

MEASUREMENTS, EVALS, LOSSES = "measurements.csv", "eval_measurements.csv", "step_losses.csv"
TABLES = (MEASUREMENTS, EVALS, LOSSES, factor_log.NAME)


def write_json(path: Path, content: Any, sync_name: bool = True) -> None:
    """Write JSON with AlgoPerf's indentation; the old file stays until the new one is complete."""
    disk.write_atomically(path, json.dumps(content, indent=2).encode() + b"\n", sync_name)


class CsvTable:
    """A CSV file that grows by rows and, when a row brings a new key, by columns.

    What the file is to hold is kept in memory, to be compared with and put back.
    """

    def __init__(self, path: Path, content: str = "") -> None:
        """Make the file hold ``content``: nothing, or the header and rows to go on from.

        Raises:
            DiskError: it cannot be written.
        """
        self.path = path
        self.note: str | None = None
        """What was done to a file that did not begin with ``content``."""
        self._set(content.encode())
        self._restore()

    def __len__(self) -> int:
        return self._rows

    @property
    def content(self) -> str:
        """Header and rows so far; empty before the first row."""
        return bytes(self._data).decode()

    def sealed(self) -> dict[str, Any]:
        """The file's entry in a run's record (:mod:`.seal`)."""
        return {"bytes": len(self._data), "rows": self._rows, "sha256": self._sha256.hexdigest()}

    def brings_columns(self, rows: list[dict[str, Any]]) -> bool:
        """Whether appending ``rows`` rewrites a file that has rows already."""
        return self._rows > 0 and any(key not in self._columns for row in rows for key in row)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows and bring the file up to date, on disk.

        Raises:
            DiskError: the file is gone, or cannot be written.
        """
        if not rows:
            return
        new = dict.fromkeys(key for row in rows for key in row if key not in self._columns)
        if new:
            text = io.StringIO(self.content, newline="")
            before = list(csv.DictReader(text))
            columns = [*self._columns, *new]
            self._set(_as_csv(columns, [*before, *rows], header=True))
            disk.write_atomically(self.path, bytes(self._data))
            return
        chunk = _as_csv(self._columns, rows, header=False)
        self._data += chunk
        self._sha256.update(chunk)
        self._rows += len(rows)
        with disk.explained(self.path):
            untouched = self.path.stat().st_size == len(self._data) - len(chunk)
        if untouched:
            disk.append(self.path, chunk)
        else:
            self.note = "was changed by someone else: put back"
            disk.write_atomically(self.path, bytes(self._data))

    def _set(self, data: bytes) -> None:
        self._data = bytearray(data)
        self._sha256 = hashlib.sha256(data)
        reader = csv.reader(io.StringIO(data.decode(), newline=""))
        self._columns: list[str] = next(reader, [])
        self._rows = sum(1 for _ in reader)

    def _restore(self) -> None:
        with disk.explained(self.path):
            there = self.path.read_bytes() if self.path.exists() else b""
        wanted = bytes(self._data)
        if not wanted:
            disk.remove(self.path)
        elif there == wanted:
            return
        elif there.startswith(wanted):
            disk.cut(self.path, len(wanted))
        else:
            lost = "rows were lost" if wanted.startswith(there) else "it was changed"
            self.note = f"{lost}: put back from the checkpoint"
            disk.write_atomically(self.path, wanted)


class MetricsLogger:
    """The ``metrics_logger`` of a workload, with AlgoPerf's method and files.

    Rows are kept in memory until :meth:`flush`, which the harness calls off the clock. (AlgoPerf's
    rewrites its CSV at each call, on the submission's clock.)
    """

    def __init__(self, run_dir: Path, contents: dict[str, str]) -> None:
        """Go on from the given contents of the CSVs, by name; none: from nothing.

        Raises:
            DiskError: a file cannot be read or written.
        """
        self._tables = {name: CsvTable(run_dir / name, contents.get(name, "")) for name in TABLES}
        self._pending: dict[str, list[dict[str, Any]]] = {name: [] for name in self._tables}
        self._makers: list[tuple[str, Callable[[], list[dict[str, Any]]]]] = []

    def append_scalar_metrics(
        self,
        metrics: dict[str, Any],
        global_step: int,
        preemption_count: int | None = None,
        is_eval: bool = False,
    ) -> None:
        """Log numbers or scalar tensors for a step; tensors are read at the next flush."""
        row = {**metrics, "global_step": global_step}
        if preemption_count is not None:
            row["preemption_count"] = preemption_count
        self._pending[MEASUREMENTS].append(row)
        if is_eval:
            self._pending[EVALS].append(dict(sorted(row.items())))

    def append_losses(self, losses: list[tuple[int, float]]) -> None:
        """Losses of training steps, as (1-based step, mean loss over its valid examples)."""
        self._pending[LOSSES] += [{"global_step": step, "loss": loss} for step, loss in losses]

    def append_rows(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> None:
        """Rows of another table, made at the next flush, off the clock; AlgoPerf's logger has no
        such method.

        Raises:
            ValueError: no table of a run folder.
        """
        if name not in self._tables:
            raise ValueError(f"{name!r} is no table of a run: {', '.join(TABLES)}")
        self._makers.append((name, make))

    def flush(self, before_rewriting: Callable[[], None] = lambda: None) -> None:
        """Write what is pending, to disk.

        Args:
            before_rewriting: called before a file that has rows is written anew with new columns,
                when what was sealed of it is about to go.

        Raises:
            DiskError: a file is gone, or cannot be written.
        """
        for name, make in self._makers:
            self._pending[name] += make()
        self._makers.clear()
        pending = {name: [_plain(row) for row in rows] for name, rows in self._pending.items()}
        if any(table.brings_columns(pending[name]) for name, table in self._tables.items()):
            before_rewriting()
        for name, table in self._tables.items():
            table.append(pending[name])
            self._pending[name].clear()

    def contents(self) -> dict[str, str]:
        """What each CSV holds, by name."""
        return {name: table.content for name, table in self._tables.items()}

    def sealed(self) -> dict[str, dict[str, Any]]:
        """Entries of the files that are there, for the run's record (:mod:`.seal`)."""
        return {name: table.sealed() for name, table in self._tables.items() if len(table)}

    def notes(self) -> list[str]:
        """What was done to files that others had changed since the last call, a line each."""
        found = [f"{name}: {table.note}" for name, table in self._tables.items() if table.note]
        for table in self._tables.values():
            table.note = None
        return found

    def finish(self) -> None:
        """AlgoPerf's name for the last flush."""
        self.flush()


class LossRecorder:
    """Wraps a workload's ``loss_fn`` and keeps each step's loss on the device until asked.

    No host synchronisation happens while a step is on the clock: only detached tensors are kept.
    A step that calls the loss several times (gradient accumulation) has one loss, their mean.
    """

    def __init__(self, loss_fn: Callable[..., dict[str, Any]]) -> None:
        self._loss_fn = loss_fn
        self._calls: list[tuple[int, Any, Any]] = []
        self.step: int | None = None
        """The 1-based step being trained, None outside ``update_params``."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        result = self._loss_fn(*args, **kwargs)
        if self.step is not None:
            summed, valid = result["summed"].detach(), result["n_valid_examples"]
            valid = valid.detach() if isinstance(valid, torch.Tensor) else valid
            self._calls.append((self.step, summed, valid))
        return result

    def drain(self) -> list[tuple[int, float]]:
        """(step, loss) of the steps since the last call; this is where the host waits."""
        if not self._calls:
            return []
        steps = [step for step, _, _ in self._calls]
        summed = torch.stack([s.double().reshape(()) for _, s, _ in self._calls]).tolist()
        device = self._calls[0][1].device
        valid = torch.stack(
            [
                torch.as_tensor(n, dtype=torch.float64, device=device).reshape(())
                for _, _, n in self._calls
            ]
        ).tolist()
        self._calls.clear()
        totals: dict[int, list[float]] = {}
        for step, s, n in zip(steps, summed, valid, strict=True):
            total = totals.setdefault(step, [0.0, 0.0])
            total[0] += s
            total[1] += n
        return [(step, s / n if n else float("nan")) for step, (s, n) in totals.items()]


def _as_csv(columns: list[str], rows: list[dict[str, Any]], header: bool) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
