"""Make Table 1 from run folders: ``python scripts/table.py --runs=results/runs``."""

from __future__ import annotations

from pathlib import Path

import run_folders
from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.study import table_text, tables

_DEFAULT = "results/table1"
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Where to write, without .md, .csv, .json. If left out: results/table1 for the default runs, "
    "nowhere for others.",
)


def main() -> int:
    """Print the tables and write them."""
    own = run_folders.are_default()
    found = run_folders.read()
    made = tables.table1(found, ROOT)
    width = table_text.terminal_width()
    print(*(table_text.render(table, width) for table in made), sep="\n\n")
    if _OUT.value or own:
        _write(paths.given("TABLE", _OUT.value or _DEFAULT, ROOT), made, asked=bool(_OUT.value))
    else:
        print(f"\nnot written: {_DEFAULT}.* is of the default runs; TABLE=name writes name.md, ...")
    return 0


def _write(stem: Path, made: list[tables.Table], asked: bool) -> None:
    """Write the three files; that nothing can be written there is an error only if asked for."""
    formats = {"md": tables.to_markdown, "csv": tables.to_csv, "json": tables.to_json}
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for ending, content in formats.items():
            Path(f"{stem}.{ending}").write_text(content(made), encoding="utf-8")
    except OSError as error:
        if asked:
            raise
        print(f"\nnot written: {paths.complaint(error)}")
    else:
        print(f"\nwritten: {paths.shown(stem, ROOT)}.md, .csv, .json")


if __name__ == "__main__":
    run(main)
