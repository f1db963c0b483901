"""Repeat a run from its folder: ``python scripts/repeat.py --run=results/runs/mini/...``."""

from __future__ import annotations

import functools

import command_line  # noqa: F401  first: it handles signals from here on
from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError

_RUN = flags.DEFINE_string("run", None, "Folder of the run, the one with run.json in it.")
_OUT = flags.DEFINE_string("out", None, "Where to; results/repeats/N, a new one, if left out.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data folder; minis have theirs with them.")


def main() -> int:
    """Train it again and say whether the parameters end the same: 0, or 1 if they do not."""
    if not _RUN.value:
        raise UserError("RUN= is needed: the folder of a run, as a table lists it")
    from algoperf_shampoo.study import repeat  # here, where a missing torch is one line

    recorded = repeat.read(paths.given("RUN", _RUN.value, ROOT))
    data = paths.given("DATA_DIR", _DATA_DIR.value, ROOT) if _DATA_DIR.value else None
    out = paths.given("OUT", _OUT.value, ROOT) if _OUT.value else repeat.new_folder(ROOT)
    print(f"repeating {paths.shown(recorded.folder, ROOT)} in {paths.shown(out, ROOT)}")
    echo = functools.partial(print, flush=True)
    again = repeat.execute(recorded, out, ROOT, data, echo=echo)
    same, lines = repeat.report(recorded, again, ROOT)
    print("", *lines, sep="\n")
    return 0 if same else 1


if __name__ == "__main__":
    run(main)
