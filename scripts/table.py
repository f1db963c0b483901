"""Make Table 1 or 3 from run folders: ``python scripts/table.py --runs=results/runs``.

With ``--check`` or ``--write`` the committed tables instead, which ``results/measured/tables.json``
lists with the runs that they follow from, and the committed pages of claims
(``results/measured/claims/pages.json``).
"""

from __future__ import annotations

import errno
from pathlib import Path

import run_folders
from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk
from algoperf_shampoo.study import comparisons, table_files, table_text, tables
from algoperf_shampoo.study.claims import committed

_COMMITTED = "results/measured/tables.json"
_NOT_OURS = (errno.EROFS, errno.EACCES, errno.EPERM)
"""A checkout of somebody else's: the table is on the terminal all the same."""
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
    default = f"results/{_TABLE.value}"
    stem = _stem(_OUT.value or default)
    own = run_folders.are_default()
    found = run_folders.read()
    made = tables.TABLES[_TABLE.value](found, ROOT)
    if run_folders.version():  # minis are of none
        made = [table for table in made if table.size == "full"]
    made = comparisons.annotate(made)
    width = table_text.terminal_width()
    print(*(table_text.render(table, width) for table in made), sep="\n\n")
    if _OUT.value or own:
        _write(stem, made, asked=bool(_OUT.value))
    else:
        print(f"\nnot written: {default}.* is of the default runs; TABLE=name writes name.md, ...")
    return 0


def _stem(text: str) -> Path:
    """Where TABLE= says that a table is to be written, without an ending."""
    stem = paths.given("TABLE", text, ROOT)
    if text.rpartition("/")[2] in ("", ".", ".."):
        inside = stem / _TABLE.value
        raise UserError(f"TABLE={text}: a folder; a name without ending is right: TABLE={inside}")
    return stem


def _write(stem: Path, made: list[tables.Table], asked: bool) -> None:
    """Write the files; that the folder can be read only is an error only if asked for."""
    try:
        disk.make_folders(stem.parent)
        formats = table_files.formats(made, stem, ROOT)
        table_files.write_files(stem, formats)
    except disk.DiskError as error:
        cause = error.__cause__
        if asked or not isinstance(cause, OSError) or cause.errno not in _NOT_OURS:
            raise
        print(f"\nnot written: {error}")
    else:
        print(f"\nwritten: {paths.shown(stem, ROOT)}.{', .'.join(formats)}")


def _committed(write: bool) -> int:
    """Compare the committed tables with what their runs give now, or write them anew."""
    stale = table_files.stale(ROOT, ROOT / _COMMITTED, write)
    stale += committed.stale(ROOT, ROOT / committed.LIST, write)
    for name in stale:
        print(f"{name}: {'written' if write else 'is not what its runs give; make tables'}")
    return 0 if write or not stale else 1


if __name__ == "__main__":
    run(main)
