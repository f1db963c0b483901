"""Write a submission as a self-contained folder: ``python scripts/export.py --variant=...``."""

from __future__ import annotations

import json
from pathlib import Path

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.study import export, memory

_VARIANT = flags.DEFINE_string("variant", "", "Folder of submissions/.")
_F = flags.DEFINE_string("f", None, "Steps between checks of the basis, instead of the point's.")
_TAU = flags.DEFINE_string("tau", None, "Threshold of Eq. 11, instead of the point's.")
_SET = flags.DEFINE_string("set", None, "Fields of the point: 'learning_rate=0.02 one_dim=adam'.")
_SEARCH_SPACE = flags.DEFINE_string("search_space", None, "Another search-space file.")
_RULESET = flags.DEFINE_string("ruleset", "external", "external, or self: the point built in.")
_OUT = flags.DEFINE_string("out", None, "Where external_tuning/ or self_tuning/ goes; exports/.")
_AUTHORS = flags.DEFINE_string("authors", "", "For submission_info.yml, separated by commas.")
_AFFILIATIONS = flags.DEFINE_string("affiliations", "", "For submission_info.yml.")


def _memory(folder: Path) -> list[str]:
    """What the entry needs of a GPU on each workload; it is run on all of them."""
    record = json.loads((folder / export.RECORD).read_text(encoding="utf-8"))
    made = submission_loader.optimizer(ROOT, record["variant"])
    return memory.preview(record["point"], optimizer=made)


def main() -> int:
    """Export, and say where to; 0."""
    out = paths.given("OUT", _OUT.value or "exports", ROOT)
    space = paths.given("SEARCH_SPACE", _SEARCH_SPACE.value, ROOT) if _SEARCH_SPACE.value else None
    folder = export.export(
        ROOT,
        _VARIANT.value,
        out,
        _AUTHORS.value,
        _AFFILIATIONS.value,
        f=_F.value,
        tau=_TAU.value,
        settings=_SET.value,
        search_space=space,
        ruleset=_RULESET.value,
    )
    print(folder)
    for line in _memory(folder) if _RULESET.value == "self" else ():
        print(line)
    if not _AUTHORS.value:
        print("note: submission_info.yml has no authors yet; AUTHORS='...' fills them in")
    return 0


if __name__ == "__main__":
    run(main)
