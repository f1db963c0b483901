"""Fields of a search-space point, as the table of docs/points.md: ``python scripts/fields.py``."""

from __future__ import annotations

from pathlib import Path

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import points
from algoperf_shampoo.harness import submission_loader

_WRITE = flags.DEFINE_bool("write", False, "Put the table into docs/points.md.")
BEGIN, END = "<!-- the table of fields -->\n", "<!-- end of the table -->\n"


def table(root: Path) -> str:
    """The Markdown table of all declared fields, and who reads them."""
    variants = submission_loader.variants(root)
    return points.table({name: submission_loader.fields(root, name) for name in variants})


def with_table(text: str, rows: str) -> str:
    """``text`` with what stands between the two marks replaced."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + rows + END + rest.partition(END)[2]


def main() -> int:
    """Print the table or write it; 0."""
    rows = table(ROOT)
    if not _WRITE.value:
        print(rows, end="")
        return 0
    path = ROOT / "docs" / "points.md"
    path.write_text(with_table(path.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
