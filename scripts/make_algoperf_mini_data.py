"""Write real mini data in AlgoPerf's on-disk formats, to run its own harness on any machine.

``python scripts/make_algoperf_mini_data.py --out=results/data/algoperf_mini``, in AlgoPerf's
environment; then ``make submit-<variant> HARNESS=algoperf SIZE=mini DATA_DIR=<out>``.
"""

from __future__ import annotations

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.algoperf import make_minidata

_OUT = flags.DEFINE_string("out", None, "Folder to write; data/algoperf_mini if left out.")
_WORKLOADS = flags.DEFINE_list("workloads", list(make_minidata.WORKLOADS), "Which to write.")


def main() -> int:
    """Write them; 0."""
    odd = [name for name in _WORKLOADS.value if name not in make_minidata.WORKLOADS]
    if odd:
        raise UserError(f"--workloads={odd[0]}: there is {', '.join(make_minidata.WORKLOADS)}")
    out = paths.given("OUT", _OUT.value or "data/algoperf_mini", ROOT)
    make_minidata.make(out, tuple(_WORKLOADS.value))
    return 0


if __name__ == "__main__":
    run(main)
