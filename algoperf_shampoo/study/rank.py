"""What a submission would score in a published pool, from its runs or from the paper's steps."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from algoperf_shampoo import versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.harness.spec import RunSpec
from algoperf_shampoo.study import cost, pooling, scores
from algoperf_shampoo.study.differences import own_point
from algoperf_shampoo.study.logs import Trial, size_of
from algoperf_shampoo.study.tables import read_paper

POOL = "2026"
_FILE = "results/published/times_2026_self.csv"


@dataclass
class Entry:
    """A submission to be ranked: seconds to target by workload, and what was assumed."""

    name: str
    times: dict[str, float]
    assumptions: list[str] = field(default_factory=list)


def of_runs(trials: Sequence[Trial]) -> list[Entry]:
    """An entry for each label of full-size runs, finished or not.

    Raises:
        UserError: there is no full-size run among them.
    """
    full = [trial for trial in trials if size_of(trial.workload) == "full"]
    if not full:
        raise UserError("RUN=: no full-size runs there; minis have no place in a pool")
    made = []
    left_out = Counter(trial.label for trial in full if trial.left_out)
    full = [trial for trial in full if not trial.left_out]
    for label, times in scores.times_of(full).items():
        own = [trial for trial in full if trial.label == label]
        entry = Entry(label, times)
        if left_out[label]:
            entry.assumptions.append(
                f"{left_out[label]} folder{'s' * (left_out[label] > 1)} left out: copies of other "
                "runs, or several of one seed"
            )
        for workload in times:
            group = [trial for trial in own if trial.workload == workload]
            outcomes = ", ".join(f"{t.study} {t.outcome}" for t in group)
            entry.assumptions.append(
                f"{workload}: {_seconds(times[workload])}, the median of {len(group)} runs "
                f"({outcomes}; what did not hit counts as not reached), as measured on their own "
                "machine"
            )
            if differ := _differing(group):
                entry.assumptions.append(f"{workload}: runs that differ in {', '.join(differ)}")
        found = sorted({trial.version for trial in own})
        if found != [POOL]:
            entry.assumptions.append(f"runs of version {', '.join(found)} in the pool of {POOL}")
        made.append(_finished(entry))
    return made


def of_paper(variant: str, root: Path) -> Entry:
    """The paper's Table 1 row of a variant: its steps times seconds a step on the pool's GPUs.

    Raises:
        UserError: the paper's Table 1 has no such variant.
    """
    rows = [r for r in read_paper(root / "results" / "paper" / "table1.json")]
    own = [row for row in rows if row["variant"] == variant and row["steps_mean"]]
    if not own:
        known = ", ".join(dict.fromkeys(row["variant"] for row in rows))
        raise UserError(f"VARIANT={variant}: the paper's Table 1 has {known}")
    content = json.loads((root / "results" / "published" / "seconds_a_step.json").read_text())
    entry = Entry(f"{variant} (paper's steps)", {})
    for row in own:
        workload = row["workload"]
        point = own_point(root, variant, workload) or {}
        run = RunSpec(variant, variant, workload, 1, 1, point, root)
        baseline = content["seconds_a_step"][workload]
        share, words = cost.optimizer_share(run, root)
        seconds = row["steps_mean"] * (baseline + (share or 0.0))
        entry.times[workload] = seconds
        entry.assumptions.append(
            f"{workload}: {_seconds(seconds)} = the paper's {row['steps_mean']} steps (mean over "
            f"{row['hits']} of {row['runs']} runs that hit) x ({baseline} s, a baseline's step on "
            f"{content['hardware']}, + {share or 0.0:.4f} s of our optimizer); {words}"
        )
    entry.assumptions.append(
        "the baseline's step is taken to be of our batch size; the paper's mean stands for the "
        "median of three studies"
    )
    return _finished(entry)


def place(entry: Entry, root: Path) -> list[str]:
    """The pool's scores with the entry among them, its tau by workload, and the assumptions."""
    version = versions.read(POOL)
    pool = scores.read_times(root / _FILE)
    if entry.name in pool:
        entry = Entry(f"{entry.name} (yours)", entry.times, entry.assumptions)
    times = {**pool, entry.name: entry.times}
    ranked = scores.scores(times, version.base_workloads)
    before = scores.scores(pool, version.base_workloads)
    own = scores.ratios(times, version.base_workloads)[entry.name]
    rank = list(ranked).index(entry.name) + 1
    lines = [
        f"{entry.name}: score {ranked[entry.name]:.4f}, place {rank} of {len(ranked)} in the pool "
        f"of {POOL}",
        "",
    ]
    for number, (name, score) in enumerate(ranked.items(), start=1):
        was = f"  (without it {before[name]:.4f})" if name in before else "  <- this entry"
        lines.append(f"{number:3d}  {score:.4f}  {name}{was}")
    lines += ["", "time over the pool's best (4 at most counts):"]
    for workload, ratio in zip(version.base_workloads, own, strict=True):
        lines.append(f"  {workload:24s} {'-' if math.isinf(ratio) else f'{ratio:.3f}'}")
    return [*lines, "", "assumptions:", *(f"  {text}" for text in entry.assumptions)]


def _finished(entry: Entry) -> Entry:
    """With the budget as a limit, and a word on the workloads that nothing is known of."""
    version = versions.read(POOL)
    for workload, time in entry.times.items():
        if workload not in version.workloads:
            entry.assumptions.append(f"{workload}: not in the pool, left out")
        elif math.isfinite(time) and time > version.budget(workload, "self"):
            entry.times[workload] = math.inf
            entry.assumptions.append(
                f"{workload}: {time:.0f} s are more than the self-tuning budget, "
                f"{version.budget(workload, 'self'):.0f} s: not reached"
            )
    missing = [w for w in version.base_workloads if w not in entry.times]
    if missing:
        entry.assumptions.append(f"counted as not reached, not run: {', '.join(missing)}")
    return entry


def variants(root: Path) -> list[str]:
    """The variants that :func:`of_paper` knows, in the suite's order."""
    rows = read_paper(root / "results" / "paper" / "table1.json")
    paper = {row["variant"] for row in rows}
    return [name for name in submission_loader.variants(root) if name in paper]


def _differing(trials: Sequence[Trial]) -> list[str]:
    """In what the runs of a label on one workload differ: trials of one number in their points,
    too."""
    keys = [pooling.row_of(trial) for trial in trials]
    places = {place for place in range(len(pooling.KEY)) if len({key[place] for key in keys}) > 1}
    point, number = pooling.KEY.index("point"), pooling.KEY.index("trial")
    by_trial: dict[int, set[str]] = {}
    for trial, key in zip(trials, keys, strict=True):
        by_trial.setdefault(trial.trial, set()).add(key[point])
    places -= {number}  # of a study's trials the first that hits counts, whatever their points
    if max(map(len, by_trial.values())) == 1:
        places -= {point}
    return [pooling.KEY[place] for place in sorted(places)]


def _seconds(value: float) -> str:
    return "not reached" if math.isinf(value) else f"{value:.0f} s"
