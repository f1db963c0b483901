"""Text of a pull request for an export: ``python scripts/submission_pr.py --export=...``."""

from __future__ import annotations

import sys

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import logs, pull_request

_EXPORT = flags.DEFINE_string("export", None, "Folder that make export-<variant> wrote.")
_RUNS = flags.DEFINE_string(
    "runs", None, "Folders of runs, comma-separated; results/runs and results/measured/mini/seeds."
)
_OUT = flags.DEFINE_string("out", None, "File to write; the folder's name and .md if left out.")
_AUTHORS = flags.DEFINE_string("authors", "", "Separated by commas.")
_AFFILIATIONS = flags.DEFINE_string("affiliations", "", "Separated by commas.")
_DEFAULT_RUNS = ("results/runs", "results/measured/mini/seeds")


def main() -> int:
    """Write the text, print it and say where it is; 0."""
    if not _EXPORT.value:
        known = [paths.shown(folder, ROOT) for folder in pull_request.exports(ROOT / "exports")]
        there = ", ".join(known) or "none yet: make export-<variant> RULESET=self"
        raise UserError(f"EXPORT= is needed: a folder that was exported; there is {there}")
    folder = paths.given("EXPORT", _EXPORT.value, ROOT)
    if _RUNS.value:
        roots = paths.listed("RUNS", _RUNS.value, ROOT)
    else:
        roots = [ROOT / name for name in _DEFAULT_RUNS if (ROOT / name).is_dir()]
    found = logs.find_trials(roots, lambda note: print(f"note: {note}", file=sys.stderr))
    text = pull_request.compose(ROOT, folder, found, _AUTHORS.value, _AFFILIATIONS.value)
    target = paths.given("OUT", _OUT.value, ROOT) if _OUT.value else folder.with_suffix(".md")
    target.write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {paths.shown(target, ROOT)}; the title wants [submission] in it")
    return 0


if __name__ == "__main__":
    run(main)
