"""The preconditioner's health in a run: ``python scripts/health.py --run=results/runs/mini/...``.

With ``--figure4`` the paper's Figures 4 and 7 of it instead.
"""

from __future__ import annotations

import command_line  # noqa: F401  first: it handles signals from here on
from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import factors, figures, health, logs

_RUN = flags.DEFINE_string("run", None, "Folder of the run, the one with factors.csv in it.")
_OUT = flags.DEFINE_string("out", None, "Folder of the figures; results/figures, if left out.")
_FIGURE4 = flags.DEFINE_bool("figure4", False, "Eigendecompositions by kind and by factor.")


def main() -> int:
    """Print the table and where the figures are; 0."""
    if not _RUN.value:
        raise UserError("RUN= is needed: the folder of a run, as a table lists it")
    folder = paths.given("RUN", _RUN.value, ROOT)
    checks = factors.read(folder)
    trial = logs.read_trial(folder)
    if not _FIGURE4.value:
        print(health.words(trial), factors.text(checks), sep="\n")
    name = health.file_name(trial)
    if _FIGURE4.value:
        drawn = health.figure4(trial, checks, f"{name}_figure4")
    else:
        drawn = health.beside_the_curve(trial, checks, f"{name}_health")
    for path in figures.write([drawn], paths.given("OUT", _OUT.value or "results/figures", ROOT)):
        print(paths.shown(path, ROOT))
    print(drawn.caption)
    return 0


if __name__ == "__main__":
    run(main)
