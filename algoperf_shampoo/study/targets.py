"""The targets of the minis, by AlgoPerf's own rule: what tuned NAdamW reaches in 75% of the budget.

1. Grid: every point of ``search_spaces/mini_grid/nadamw.json``, seed 101. Best: the highest
   validation metric at 75% of the step budget. The schedule ends with the budget.
2. Seeds: the best point with seeds 201, 202, 203. Target: the mean of the metric at 75% of the
   budget, for validation and test alike, rounded down to four digits.

None of these seeds is among those of the tables' runs. The logs lie in ``results/measured/mini/``;
``scripts/mini_targets.py`` does the sum again. They were made with the workload files of
:func:`write_unreachable`, so that no run ended early.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study.logs import Trial, find_trials

SHARE_OF_BUDGET = 0.75
GRID_SEED = 101
SEEDS = (201, 202, 203)


@dataclass(frozen=True)
class Target:
    """Targets of one mini, and the folders of the runs they are the mean of."""

    workload: str
    learning_rate: float
    validation: float
    test: float
    runs: tuple[Path, ...]


def value_at(trial: Trial, step: int, split: str) -> float:
    """The trial's metric on ``split`` at an evaluation step.

    Raises:
        UserError: there was no evaluation at that step.
    """
    for evaluation in trial.evaluations:
        if evaluation.step == step:
            return evaluation.row[f"{split}/{trial.metric}"]
    raise UserError(f"{trial.path}: no evaluation at step {step}; was the run cut short?")


def measured_targets(grid: Path, seeds: Path, max_steps: dict[str, int]) -> list[Target]:
    """Targets from the folders of the grid's runs and of the seeds' runs.

    Args:
        max_steps: step budget per workload, by name (``fastmri_mini``).

    Raises:
        UserError: a run is missing or has another seed than the rule's, or the seeds were run at
            another point than the grid's best.
    """
    found = []
    for workload, budget in max_steps.items():
        step = int(SHARE_OF_BUDGET * budget)
        trials = [t for t in find_trials([grid]) if t.workload == workload]
        if not trials:
            raise UserError(f"{grid}: no runs of {workload}")
        for trial in trials:
            if trial.seed != GRID_SEED:
                raise UserError(f"{trial.path}: seed {trial.seed}, the grid's is {GRID_SEED}")
        best = max(trials, key=lambda t: value_at(t, step, "validation"))
        runs = [t for t in find_trials([seeds]) if t.workload == workload]
        if tuple(sorted(t.seed or 0 for t in runs)) != SEEDS:
            have = ", ".join(str(t.seed) for t in runs) or "none"
            wanted = ", ".join(map(str, SEEDS))
            raise UserError(f"{seeds}: seeds of {workload}: {have}; the rule wants {wanted}")
        for run in runs:
            if run.hparams != best.hparams:
                raise UserError(f"{run.path}: not the grid's best point, which is {best.path}")
        means = {
            split: statistics.mean(value_at(t, step, split) for t in runs)
            for split in ("validation", "test")
        }
        found.append(
            Target(
                workload,
                (best.hparams or {})["learning_rate"],
                _down(means["validation"]),
                _down(means["test"]),
                tuple(t.path for t in runs),
            )
        )
    return found


def write_target(config: Path, target: Target) -> None:
    """Put a mini's targets into its workload file, leaving every other byte as it is."""
    head, mini, tail = config.read_text(encoding="utf-8").partition('"mini"')
    for name, value in (("validation", target.validation), ("test", target.test)):
        pattern = rf'("{name}_target_value": )[0-9.]+'
        tail = re.sub(pattern, rf"\g<1>{value}", tail, count=1)
    config.write_text(head + mini + tail, encoding="utf-8")


def write_unreachable(configs: Sequence[Path], folder: Path) -> None:
    """Copies of workload files in ``folder``, with minis' targets of 1.0, which no run reaches.

    Raises:
        FileExistsError: a file is there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in configs:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["mini"] |= {"validation_target_value": 1.0, "test_target_value": 1.0}
        with (folder / path.name).open("x", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")


def _down(value: float) -> float:
    return math.floor(value * 1e4) / 1e4
