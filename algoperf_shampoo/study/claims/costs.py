"""What the runs of a study of claims take of one core, foretold from measured parts of a run.

``results/measured/claims/costs.json`` has, by mini, seconds of an evaluation, and of a step by
variant and F (of no F for variants without); a run is its start, its steps and its evaluations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from algoperf_shampoo.harness.hparams import F_KEY
from algoperf_shampoo.harness.progress import duration
from algoperf_shampoo.harness.spec import MINI, RunSpec
from algoperf_shampoo.study import files
from algoperf_shampoo.study.study import Job

RECORD = Path("results") / "measured" / "claims" / "costs.json"


def seconds(run: RunSpec, record: dict[str, Any]) -> float | None:
    """Core-seconds of a run; None where no run like it was measured."""
    mini = run.workload.removesuffix(MINI)
    step = record.get("step", {}).get(_key(run), {}).get(mini)
    evaluation = record.get("evaluation", {}).get(mini)
    if step is None or evaluation is None or not run.max_steps:
        return None
    every = run.eval_period or int(record["evaluated_every"])
    evaluations = 1 + run.max_steps // every
    return float(record["start"]) + run.max_steps * step + evaluations * evaluation


def longest_first(jobs: Sequence[Job], root: Path) -> list[Job]:
    """By seed, and for each seed the longest first, those of unknown length before all."""
    record = _record(root)

    def order(job: Job) -> tuple[int, float]:
        own = seconds(job.run, record)
        return job.run.seed, -own if own is not None else float("-inf")

    return sorted(jobs, key=order)


def lines(jobs: Sequence[Job], cores: int, root: Path) -> list[str]:
    """The cost of some runs in words: core time, and wall time on so many cores."""
    record = _record(root)
    known = [own for job in jobs if (own := seconds(job.run, record)) is not None]
    if not known:
        return [f"cost of {len(jobs)} runs: unknown: no run like them is known"]
    total = sum(known)
    made = [
        f"cost of {len(jobs)} runs: {total:.0f} core-seconds ({duration(total)} of one core), at "
        f"least {duration(max(total / cores, max(known)))} on {cores}; by {RECORD.as_posix()}"
    ]
    if len(known) < len(jobs):
        made.append(f"  {len(jobs) - len(known)} runs not in it: none like them is known")
    return made


def _key(run: RunSpec) -> str:
    frequency = run.hparams.get(F_KEY)
    return run.variant if frequency is None else f"{run.variant}_F{frequency}"


def _record(root: Path) -> dict[str, Any]:
    try:
        return files.read_json(root / RECORD)
    except files.Unreadable:
        return {}
