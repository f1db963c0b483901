"""Figures or a report of runs: ``python scripts/figures.py --runs=results/runs [--report]``."""

from __future__ import annotations

import run_folders
from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.disk import write_atomically
from algoperf_shampoo.study import figures, report, report_health, tables

_OUT = flags.DEFINE_string("out", None, "Folder of the figures, or the page of the report.")
_REPORT = flags.DEFINE_bool("report", False, "Write one self-contained page instead.")
_TITLE = flags.DEFINE_string("title", "Shampoo under AlgoPerf: runs", "Of the report.")


def main() -> int:
    """Write them and say where they are; 0."""
    trials = run_folders.read()
    if not trials:
        raise UserError("no runs to draw yet: make submit-<variant>, or RUNS= names their folder")
    made = tables.table1(trials, ROOT)
    drawn = figures.draw(made, trials, ROOT)
    if not _REPORT.value:
        if not drawn:
            raise UserError(
                f"none of the {len(trials)} runs is counted, so there is nothing to draw: "
                "make table1 with the same RUNS= says why"
            )
        folder = paths.given("OUT", _OUT.value or "results/figures", ROOT)
        for path in figures.write(drawn, folder):
            print(paths.shown(path, ROOT))
        return 0
    page = paths.given("OUT", _OUT.value or "results/report.html", ROOT)
    page.parent.mkdir(parents=True, exist_ok=True)
    drawn += report_health.draw(made, trials, ROOT)
    content = report.build(made, drawn, trials, ROOT, page, _TITLE.value)
    write_atomically(page, content.encode("utf-8", "surrogateescape"))
    print(paths.shown(page, ROOT))
    return 0


if __name__ == "__main__":
    run(main)
