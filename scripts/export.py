"""Write a submission as a self-contained folder: ``python scripts/export.py --variant=...``."""

from __future__ import annotations

from pathlib import Path

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo.study import export

_VARIANT = flags.DEFINE_string("variant", "", "Folder of submissions/.")
_OUT = flags.DEFINE_string("out", None, "Where external_tuning/ goes; exports/ if left out.")
_AUTHORS = flags.DEFINE_string("authors", "", "For submission_info.yml, separated by commas.")
_AFFILIATIONS = flags.DEFINE_string("affiliations", "", "For submission_info.yml.")


def main() -> int:
    """Export, and say where to; 0."""
    out = Path(_OUT.value).expanduser() if _OUT.value else ROOT / "exports"
    folder = export.export(ROOT, _VARIANT.value, out, _AUTHORS.value, _AFFILIATIONS.value)
    print(folder)
    if not _AUTHORS.value:
        print("note: submission_info.yml has no authors yet; AUTHORS='...' fills them in")
    return 0


if __name__ == "__main__":
    run(main)
