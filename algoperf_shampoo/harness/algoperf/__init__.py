"""The door to AlgoPerf's own ``submission_runner.py``: checks, commands, resuming."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from algoperf_shampoo.study.plan import Plan


def launch(plan: Plan, flags: dict[str, Any] | None = None) -> int:
    """Run a plan under AlgoPerf's harness; the number of runs that failed. See :mod:`.door`."""
    from algoperf_shampoo.harness.algoperf import door

    return door.launch(plan, flags or {})
