"""Make Table 1 or 3 from run folders: ``python scripts/table.py --runs=results/runs``.

With ``--check`` or ``--write`` the committed tables instead, which ``results/measured/tables.json``
lists with the runs that they follow from.
"""

from __future__ import annotations

from pathlib import Path

import run_folders
from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.study import comparisons, table_files, table_text, tables

_COMMITTED = "results/measured/tables.json"
_TABLE = flags.DEFINE_enum("table", "table1", sorted(tables.TABLES), "Which table of the paper.")
_OUT = flags.DEFINE_string(
    "out",
    None,
    "Where to write, without .md and so on. If left out: results/table1 (or 3) for the default "
    "runs, nowhere for others.",
)
_CHECK = flags.DEFINE_bool("check", False, "Say which committed tables differ from their runs'.")
_WRITE = flags.DEFINE_bool("write", False, "Write the committed tables anew.")


def main() -> int:
    """Print the tables and write them."""
    if _CHECK.value or _WRITE.value:
        return _committed(_WRITE.value)
    own = run_folders.are_default()
    found = run_folders.read()
    made = tables.TABLES[_TABLE.value](found, ROOT)
    if run_folders.version():  # minis are of none
        made = [table for table in made if table.size == "full"]
    made = comparisons.annotate(made)
    width = table_text.terminal_width()
    print(*(table_text.render(table, width) for table in made), sep="\n\n")
    default = f"results/{_TABLE.value}"
    if _OUT.value or own:
        _write(paths.given("TABLE", _OUT.value or default, ROOT), made, asked=bool(_OUT.value))
    else:
        print(f"\nnot written: {default}.* is of the default runs; TABLE=name writes name.md, ...")
    return 0


def _write(stem: Path, made: list[tables.Table], asked: bool) -> None:
    """Write the files; that nothing can be written there is an error only if asked for."""
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        formats = table_files.formats(made, stem, ROOT)
        for ending, content in formats.items():
            Path(f"{stem}.{ending}").write_text(content, encoding="utf-8")
    except OSError as error:
        if asked:
            raise
        print(f"\nnot written: {paths.complaint(error)}")
    else:
        print(f"\nwritten: {paths.shown(stem, ROOT)}.{', .'.join(formats)}")


def _committed(write: bool) -> int:
    """Compare the committed tables with what their runs give now, or write them anew."""
    stale = table_files.stale(ROOT, ROOT / _COMMITTED, write)
    for name in stale:
        print(f"{name}: {'written' if write else 'is not what its runs give; make tables'}")
    return 0 if write or not stale else 1


if __name__ == "__main__":
    run(main)
