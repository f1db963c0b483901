"""The table of the acceptance's records: ``python -m tests.algoperf.acceptance_table``.

It stands in ``results/measured/algoperf_cpu/README.md``; a test holds it against the records.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parents[2] / "results" / "measured" / "algoperf_cpu"
HEAD = ("variant", "workload", "mean loss, first and last quarter")
HEAD += ("checks, refreshes, failures", "factors by rank, of all")
HEAD += ("ends as the unbroken run, to the bit", "commit")
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
    said = said or "none was resumed"
    losses = f"{first:.4g}, {last:.4g}"
    sharding = record["point"].get("sharding")
    names = record["variant"] + (f", sharding {sharding}" if sharding else ""), record["workload"]
    return [*names, losses, counts, kept_by(record), said, record["commit"][:7]]


def kept_by(record: dict[str, Any]) -> str:
    """How many factors each rank keeps; older records do not say."""
    kept = record.get("factors_kept", {}).get("two")
    if kept is None:
        return "not recorded"
    pairs = [pair for pair in kept if pair and pair[1]]
    return " + ".join(str(own) for own, _ in pairs) + f" of {pairs[0][1]}" if pairs else "none"


if __name__ == "__main__":
    print(*table(), sep="\n")
