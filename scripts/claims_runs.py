"""The runs behind the committed pages of claims, unpacked: ``python scripts/claims_runs.py``.

With ``--runs=FOLDER`` the other way: the runs of the studies there, packed into the archives that
``results/measured/claims/pages.json`` names.
"""

from __future__ import annotations

from pathlib import Path

import command_line  # noqa: F401  first: it handles signals from here on
from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study.claims import committed

_CLAIMS = flags.DEFINE_list("claims", None, "Studies of claims; all that have runs if left out.")
_OUT = flags.DEFINE_string("out", "results/runs/committed", "Folder of the unpacked studies.")
_RUNS = flags.DEFINE_string("runs", None, "Pack the studies' runs in this folder instead.")


def main() -> int:
    """Unpack, or pack, and say what; 0."""
    for page in _pages():
        if _RUNS.value:
            _pack(page, paths.given("RUNS", _RUNS.value, ROOT))
        elif page.runs is not None:
            folder = paths.given("OUT", _OUT.value, ROOT) / page.study
            new = committed.unpack(page.runs, folder)
            shown = paths.shown(folder, ROOT)
            print(f"{paths.shown(page.runs, ROOT)}: {'in' if new else 'there already:'} {shown}")
            print(f"make claims CLAIMS={page.study} OUT={shown}  # weighs them again")
    return 0


def _pages() -> list[committed.Page]:
    """The pages of the studies that were asked for; UserError: there is no page of one."""
    listed = {page.study: page for page in committed.pages(ROOT, ROOT / committed.LIST)}
    wanted = _CLAIMS.value or [name for name, page in listed.items() if page.runs is not None]
    if _RUNS.value and not _CLAIMS.value:
        raise UserError("RUNS= packs runs: CLAIMS= is needed, the studies whose archives to write")
    for name in wanted:
        if name not in listed:
            raise UserError(f"CLAIMS={name}: pages are of {', '.join(listed)}")
        if listed[name].runs is None and not _RUNS.value:
            raise UserError(f"CLAIMS={name}: it has not been run, so there is nothing to unpack")
    return [listed[name] for name in wanted]


def _pack(page: committed.Page, folder: Path) -> None:
    count, missing = committed.pack(ROOT, page, folder)
    print(f"{page.study}: {count} runs packed")
    print(*(f"not there: {name}" for name in missing), sep="\n", end="\n" if missing else "")


if __name__ == "__main__":
    run(main)
