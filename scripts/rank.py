"""What a submission would score in AlgoPerf's 2026 pool: ``scripts/rank.py --run=FOLDER``."""

from __future__ import annotations

import sys

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import logs, rank

_RUN = flags.DEFINE_string("run", None, "Folders of full-size runs, comma-separated.")
_VARIANT = flags.DEFINE_string(
    "variant",
    None,
    "Instead of runs: the paper's steps of this variant. All, if both are left out.",
)


def main() -> int:
    """Print score, place and assumptions of each entry.

    Raises:
        UserError: a folder or a variant that is not there, or both kinds of entries at once.
    """
    if _RUN.value and _VARIANT.value:
        raise UserError("RUN= and VARIANT=: one of them")
    if _RUN.value:
        folders = paths.listed("RUN", _RUN.value, ROOT)
        entries = rank.of_runs(
            logs.find_trials(folders, lambda note: print(f"note: {note}", file=sys.stderr))
        )
    else:
        wanted = [_VARIANT.value.replace("-", "_")] if _VARIANT.value else rank.variants(ROOT)
        entries = [rank.of_paper(variant, ROOT) for variant in wanted]
    print("\n\n".join("\n".join(rank.place(entry, ROOT)) for entry in entries))
    return 0


if __name__ == "__main__":
    run(main)
