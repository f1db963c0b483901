"""``python -m algoperf_shampoo.harness.algoperf.worker MODULE FLAGS``: a process of a run.

It runs ``MODULE`` (AlgoPerf's ``submission_runner``, say) as ``python -m MODULE FLAGS`` would, and
nothing else, but dies with the process that started it: torch elastic does not see to that.
"""

from __future__ import annotations

import runpy
import sys

from algoperf_shampoo.harness.algoperf import processes


def main() -> None:
    """Ask to die with the parent, then become the module."""
    processes.die_with_parent()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
