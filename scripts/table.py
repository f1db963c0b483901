"""Make Table 1 from run folders: ``python scripts/table.py --runs=results/runs``."""

from __future__ import annotations

from pathlib import Path

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo.study import logs, tables

_RUNS = flags.DEFINE_list("runs", ["results/runs"], "Folders of runs, comma-separated.")
_OUT = flags.DEFINE_string("out", "results/table1", "Where to write, without .md, .csv, .json.")


def main() -> int:
    """Print the tables and write them."""
    folders = [ROOT / folder for folder in _RUNS.value]
    # Before the first run the default folder does not exist, and the table says "no runs yet".
    found = logs.find_trials(
        f for f in folders if f.exists() or not flags.FLAGS["runs"].using_default_value
    )
    made = tables.table1(found, ROOT)
    print(*(tables.to_text(table) for table in made), sep="\n\n")
    stem = ROOT / _OUT.value
    stem.parent.mkdir(parents=True, exist_ok=True)
    for ending, content in (
        ("md", tables.to_markdown(made)),
        ("csv", tables.to_csv(made)),
        ("json", tables.to_json(made)),
    ):
        Path(f"{stem}.{ending}").write_text(content, encoding="utf-8")
    print(f"\nwritten: {_OUT.value}.md, .csv, .json")
    return 0


if __name__ == "__main__":
    run(main)
