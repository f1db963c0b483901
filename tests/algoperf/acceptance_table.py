"""The table of the acceptance's records: ``python -m tests.algoperf.acceptance_table``.

It stands in ``results/measured/algoperf_cpu/README.md``; a test holds it against the records.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parents[2] / "results" / "measured" / "algoperf_cpu"
HEAD = ("variant", "workload", "mean loss, first and last quarter")
HEAD += ("checks, refreshes, failures", "ends as the unbroken run, to the bit", "commit")
COUNTS = ("eigenbasis_checks", "eigenbasis_refreshes", "eigenbasis_failures")


def table(folder: Path = RECORDS) -> list[str]:
    """Lines of Markdown, a row for each record of this tool's present format."""
    rows = [row(record) for record in map(read, sorted(folder.glob("*.json"))) if is_ours(record)]
    head = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return head + ["| " + " | ".join(cells) + " |" for cells in rows]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def is_ours(record: Any) -> bool:
    """Whether a record has what the table shows; older ones lack it."""
    return "ends_as_the_unbroken_run_bitwise" in record


def row(record: dict[str, Any]) -> list[str]:
    """Its cells."""
    first, last = record["loss_first_last_quarter"]
    counts = (
        ", ".join(f"{record['eigenbasis'][-1][name]:.0f}" for name in COUNTS)
        if record["eigenbasis"]
        else "none"
    )
    ends = record["ends_as_the_unbroken_run_bitwise"]
    said = ", ".join(name if good else f"NOT {name}" for name, good in ends.items())
    losses = f"{first:.4g}, {last:.4g}"
    shared = ", sharding on" if record["point"].get("sharding") == "on" else ""
    names = record["variant"] + shared, record["workload"]
    return [*names, losses, counts, said, record["commit"][:7]]


if __name__ == "__main__":
    print(*table(), sep="\n")
