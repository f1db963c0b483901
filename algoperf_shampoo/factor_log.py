"""``factors.csv`` of a run under AlgoPerf's harness, which knows no such file.

What the file holds is in the checkpoint too, so that a run that was killed and goes on has the rows
of its checkpoint and those after it, each once. Imports the standard library alone; exported
submissions take it along.
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

NAME = "factors.csv"
VARIABLE = "SHAMPOO_TELEMETRY"
"""Of the environment. "off": factors are not watched (docs/telemetry.md). Under AlgoPerf's harness
the folder of the file, as our launcher says; without it they are not watched there either."""


class FactorLog:
    """The file, kept in memory and written whole: it stays small, see docs/telemetry.md.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self.path = folder / NAME
        self.columns = tuple(columns)
        self.content = ""

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows, on disk. What cannot be written is said, and comes with the next rows: such a
        file is no reason to end a training."""
        if not rows:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if not self.content:
            writer.writeheader()
        writer.writerows(rows)
        self.content += text.getvalue()
        self._write()

    def replace(self, content: str) -> None:
        """The file is as a checkpoint has it."""
        self.content = content
        if content or self.path.exists():
            self._write()

    def _write(self) -> None:
        fresh = self.path.with_name(f".{NAME}.tmp")
        try:
            with open(fresh, "w", encoding="utf-8", newline="") as file:
                file.write(self.content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.path)
        except OSError as error:
            log.warning("%s: not written: %s", self.path, error.strerror or error)
