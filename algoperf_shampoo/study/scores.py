"""AlgoPerf's performance profile and score, as its scoring code computes them.

* Time to target of a submission on a workload: in each study the first trial to reach the target,
  counted in evaluations (the scoring code's rule; not the least time), and of the studies' times
  the median. A study without a hit is infinite.
* A time above four times the pool's best is infinite. A workload on which the held-out variant
  drawn for it is not reached is infinite as well.
* Profile: rho(tau) is the share of the workloads on which a submission is within tau of the pool's
  best (Dolan and More 2002). Score: its integral over tau from 1 to 4 by the trapezoid rule on
  100 points, divided by 3.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import files
from algoperf_shampoo.study.logs import Trial

LEAST_TAU, MOST_TAU, POINTS = 1.0, 4.0, 100
TAUS = [LEAST_TAU + (MOST_TAU - LEAST_TAU) * i / (POINTS - 1) for i in range(POINTS)]

Times = Mapping[str, Mapping[str, float]]
"""Seconds to target by submission and workload; infinite where it was not reached."""


def time_to_target(trials: Iterable[Trial]) -> float:
    """Of one submission's trials on one workload; infinite without trials."""
    studies: dict[str, list[Trial]] = {}
    for trial in trials:
        studies.setdefault(trial.study, []).append(trial)
    times = [_of_study(group) for group in studies.values()]
    return float(statistics.median(times)) if times else math.inf


def times_of(trials: Iterable[Trial]) -> dict[str, dict[str, float]]:
    """Times to target of many trials, by their labels and workloads."""
    groups: dict[str, dict[str, list[Trial]]] = {}
    for trial in trials:
        groups.setdefault(trial.label, {}).setdefault(trial.workload, []).append(trial)
    return {
        label: {workload: time_to_target(group) for workload, group in workloads.items()}
        for label, workloads in groups.items()
    }


def ratios(
    times: Times, workloads: Sequence[str], held_out: Sequence[str] = ()
) -> dict[str, list[float]]:
    """tau of each submission on each workload: its time over the pool's best, at most 4, or inf."""
    limited = {
        workload: _limited({name: own.get(workload, math.inf) for name, own in times.items()})
        for workload in (*workloads, *held_out)
    }
    variant_of = {base_of(variant, workloads): variant for variant in held_out}
    found: dict[str, list[float]] = {}
    for name in times:
        found[name] = []
        for workload in workloads:
            best = min(limited[workload].values())
            own = limited[workload][name]
            variant = variant_of.get(workload)
            if variant is not None and math.isinf(limited[variant][name]):
                own = math.inf
            found[name].append(own / best if math.isfinite(own) else math.inf)
    return found


def profile(of: Sequence[float]) -> list[float]:
    """rho at each of :data:`TAUS`, of a submission's ratios."""
    return [sum(ratio <= tau for ratio in of) / len(of) for tau in TAUS]


def score(of: Sequence[float]) -> float:
    """The score of a submission's ratios."""
    rho = profile(of)
    step = (MOST_TAU - LEAST_TAU) / (POINTS - 1)
    return step * (sum(rho) - (rho[0] + rho[-1]) / 2) / (MOST_TAU - LEAST_TAU)


def scores(
    times: Times, workloads: Sequence[str], held_out: Sequence[str] = ()
) -> dict[str, float]:
    """Scores of a pool, the best first."""
    made = {name: score(of) for name, of in ratios(times, workloads, held_out).items()}
    return dict(sorted(made.items(), key=lambda item: (-item[1], item[0])))


def base_of(variant: str, workloads: Sequence[str]) -> str:
    """The workload that a held-out variant is of: ``fastmri`` of ``fastmri_tanh``."""
    return next((name for name in workloads if name in variant), variant)


def read_times(path: Path) -> dict[str, dict[str, float]]:
    """A file ``time_to_targets.csv`` of AlgoPerf's scoring: submissions by workloads.

    Raises:
        UserError: no such file, or not of this form.
    """
    try:
        header, rows, problem = files.read_csv(path)
    except files.Unreadable as reason:
        raise UserError(f"{path}: {reason}") from None
    if problem or not header or header[0] != "submission":
        raise UserError(f"{path}: {problem or 'its first column must be submission'}")
    found: dict[str, dict[str, float]] = {}
    for line, row in rows:
        values = [files.number(text) for text in row[1:]]
        if any(value is None or value <= 0 for value in values):
            raise UserError(f"{path}: line {line}: a time that is no number above 0")
        own = [math.inf if v is None or math.isnan(v) else v for v in values]  # nan: it was not run
        found[row[0]] = dict(zip(header[1:], own, strict=True))
    return found


def write_times(path: Path, times: Times) -> None:
    """Write a file that :func:`read_times` reads."""
    workloads = sorted({workload for own in times.values() for workload in own})
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["submission", *workloads])
        for name, own in times.items():
            writer.writerow([name, *(own.get(workload, math.inf) for workload in workloads)])


def _of_study(trials: Sequence[Trial]) -> float:
    """Time of the trial that reaches the target in the fewest evaluations.

    Of several the least time counts. (The scoring code takes whichever its file system lists first;
    this choice gives the published scores.)
    """
    reached = []
    for trial in trials:
        if trial.time_to_target is not None:
            steps = [evaluation.step for evaluation in trial.evaluations]
            reached.append((steps.index(trial.steps_to_target or 0), trial.time_to_target))
    return min(reached)[1] if reached else math.inf


def _limited(of: Mapping[str, float]) -> dict[str, float]:
    best = min(of.values())
    return {name: math.inf if time > MOST_TAU * best else time for name, time in of.items()}
