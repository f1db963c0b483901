"""The files of a run folder: AlgoPerf's CSVs and JSONs, and the loss of every step."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.checkpoint import write_atomically

MEASUREMENTS, EVALS, LOSSES = "measurements.csv", "eval_measurements.csv", "step_losses.csv"


def write_json(path: Path, content: Any) -> None:
    """Write JSON with AlgoPerf's indentation; the old file stays until the new one is complete."""
    write_atomically(path, json.dumps(content, indent=2).encode() + b"\n")


class CsvTable:
    """A CSV file that grows by rows and, when a row brings a new key, by columns."""

    def __init__(self, path: Path, keep_rows: int = 0) -> None:
        """Continue the file at ``path`` after its first ``keep_rows`` rows; the rest is dropped."""
        self.path = path
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []
        if keep_rows:
            if not path.is_file():
                raise UserError(f"{path}: gone, so the run cannot go on; remove its folder")
            with open(path, newline="") as file:
                reader = csv.DictReader(file)
                self._rows = [row for row, _ in zip(reader, range(keep_rows), strict=False)]
                self._columns = list(reader.fieldnames or [])
            self._rewrite()
        else:
            path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._rows)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows and bring the file up to date."""
        if not rows:
            return
        new = [key for row in rows for key in row if key not in self._columns]
        self._rows += rows
        if new:
            self._columns += list(dict.fromkeys(new))
            self._rewrite()
            return
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        with open(self.path, "a", newline="") as file:
            file.write(text.getvalue())

    def _rewrite(self) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self.path, text.getvalue().encode())


class MetricsLogger:
    """The ``metrics_logger`` of a workload, with AlgoPerf's method and files.

    Rows are kept in memory until :meth:`flush`, which the harness calls off the clock. (AlgoPerf's
    rewrites its CSV at each call, on the submission's clock.)
    """

    def __init__(self, run_dir: Path, rows_kept: dict[str, int]) -> None:
        self._tables = {
            name: CsvTable(run_dir / name, rows_kept.get(name, 0))
            for name in (MEASUREMENTS, EVALS, LOSSES)
        }
        self._pending: dict[str, list[dict[str, Any]]] = {name: [] for name in self._tables}

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

    def flush(self) -> dict[str, int]:
        """Write what is pending; the number of rows each file now has."""
        for name, rows in self._pending.items():
            self._tables[name].append([_plain(row) for row in rows])
            rows.clear()
        return {name: len(table) for name, table in self._tables.items()}

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


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
