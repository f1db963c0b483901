"""Write real mini data in AlgoPerf's on-disk formats, to run its own harness on any machine.

``make data-algoperf-mini`` runs it, in AlgoPerf's environment; then ``make submit-<variant>
HARNESS=algoperf SIZE=mini DATA_DIR=data/algoperf_mini``. What it writes: :mod:`algoperf_formats`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import flags  # noqa: E402
from command_line import ROOT, run  # noqa: E402

from algoperf_shampoo import paths  # noqa: E402
from algoperf_shampoo.errors import UserError  # noqa: E402

# After command_line, which lets the package be found.
import algoperf_formats  # noqa: E402  isort: skip

_OUT = flags.DEFINE_string("out", None, "Folder to write; data/algoperf_mini if left out.")
_WORKLOADS = flags.DEFINE_list("workloads", list(algoperf_formats.WORKLOADS), "Which to write.")


def main() -> int:
    """Write them; 0."""
    odd = [name for name in _WORKLOADS.value if name not in algoperf_formats.WORKLOADS]
    if odd:
        raise UserError(f"--workloads={odd[0]}: there is {', '.join(algoperf_formats.WORKLOADS)}")
    out = paths.given("OUT", _OUT.value or "data/algoperf_mini", ROOT)
    algoperf_formats.make(out, tuple(_WORKLOADS.value))
    return 0


if __name__ == "__main__":
    run(main)
