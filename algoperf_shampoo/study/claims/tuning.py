"""The learning rates of arms that are tuned, and the runs of a study of claims in their two phases.

An arm's rate on a mini is the one of its grid whose mean loss over the tuning seeds (the claims'
own statistic) is the lowest; one that is not finite ranks worst, and of equals the smaller wins.
It is chosen as soon as these runs are done, so that the runs which are reported can follow while
other arms are still being tuned.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from algoperf_shampoo import json_input
from algoperf_shampoo.study import files, logs, plan, progress, study
from algoperf_shampoo.study.claims import file
from algoperf_shampoo.study.claims.elsewhere import Elsewhere
from algoperf_shampoo.study.claims.statistics import of_run
from algoperf_shampoo.study.study import Job, Options, Study

LOSS = "loss"
Place = tuple[str, str]
"""Arm and workload."""


@dataclass(frozen=True)
class Choice:
    """An arm's learning rate on a mini, and the mean loss of every rate of its grid; ``folders``:
    of the runs that it is of, LABEL."""

    rate: float
    losses: Mapping[float, float]
    folders: Mapping[float, Path] = field(default_factory=dict)

    @property
    def at_edge(self) -> bool:
        """Whether it is the smallest or the largest: a wider grid might hold a better one."""
        return self.rate in (min(self.losses), max(self.losses))


def choose(rates: Sequence[float], losses: Mapping[float, Sequence[float]]) -> Choice:
    """The best rate of a grid; ``losses`` by rate, one a seed."""
    means = {
        rate: statistics.fmean(losses[rate]) if all(map(math.isfinite, losses[rate])) else math.inf
        for rate in sorted(rates)
    }
    return Choice(min(means, key=lambda rate: (means[rate], rate)), means)


@dataclass
class Phases:
    """A study of claims as it goes: tuning first, then the runs it reports.

    ``study`` has the latter as far as they are known; ``choices`` by arm and workload.
    """

    root: Path
    path: Path
    options: Options
    quick: bool
    declared: file.Declared
    content: dict[str, Any]
    study: Study
    tuning: Study | None
    elsewhere: Elsewhere
    choices: dict[Place, Choice] = field(default_factory=dict)
    _places: dict[Path, tuple[Place, float, int]] = field(default_factory=dict)
    _losses: dict[Place, dict[float, dict[int, float]]] = field(default_factory=dict)
    _folders: dict[Place, dict[float, Path]] = field(default_factory=dict)

    def after(self, job: Job) -> list[Job]:
        """What can be run once a job is done."""
        known = self._places.get(job.run.run_dir)
        if known is None or known[0] in self.choices or not self._read(job):
            return []
        place = known[0]
        rows = file.measured(self.content, {place: self.choices[place].rate})
        rows["rows"] = [
            row if file.place(number, self.declared.arms) == place else None
            for number, row in enumerate(rows["rows"], start=1)
        ]
        laid_out = study.lay_out(self.root, str(self.path), self.options, rows).jobs
        new = self.elsewhere.found(laid_out)
        self.study = replace(self.study, jobs=(*self.study.jobs, *new))
        return list(new)

    @property
    def jobs(self) -> tuple[Job, ...]:
        """Every run that is known by now, those that rates are chosen by among them."""
        return (*self.study.jobs, *(self.tuning.jobs if self.tuning is not None else ()))

    def foreseen(self) -> tuple[Job, ...]:
        """Runs that will follow when the rates are known that are not yet, at another rate."""
        if self.tuning is None:
            return ()
        left = {
            (arm, workload): grid[len(grid) // 2]
            for arm, grid in self.declared.rates.items()
            for workload in plan.WORKLOADS
            if (arm, workload) not in self.choices
        }
        rows = file.measured(self.content, left)
        rows["rows"] = [
            row if file.place(number, self.declared.arms) in left else None
            for number, row in enumerate(rows["rows"], start=1)
        ]
        return study.lay_out(self.root, str(self.path), self.options, rows).jobs

    def _read(self, job: Job) -> bool:
        """Take a tuning run's loss; whether its arm's rate on its mini is known by it."""
        place, rate, seed = self._places[job.run.run_dir]
        trial = logs.read_trial(job.run.run_dir)
        if trial.outcome != logs.ALL_STEPS:
            return False
        steps = files.read_json(trial.path / "run.json")["identity"]["workload_properties"]
        try:
            loss = of_run(trial, LOSS, int(steps["max_steps"]))
        except files.Unreadable:
            return False  # as of a run that is not there: its arm's rate stays unknown
        mine = self._losses.setdefault(place, {})
        mine.setdefault(rate, {})[seed] = loss
        label = trial.path.parents[2]  # label / seed / workload / trial
        self._folders.setdefault(place, {})[rate] = label
        rates, seeds = self.declared.rates[place[0]], self.declared.tuning_seeds
        if any(len(mine.get(r, {})) < len(seeds) for r in rates):
            return False
        losses = {r: [mine[r][s] for s in seeds] for r in rates}
        folders = {r: self._folders[place][r] for r in rates}
        self.choices[place] = replace(choose(rates, losses), folders=folders)
        return True


def lay_out(root: Path, name: str, out: str | None, quick: bool) -> Phases:
    """A study of claims as its folders have it. A quick one tunes nothing: arms that are to be
    tuned take the middle of their grids.

    Raises:
        UserError: no such study, or a mistake in its file.
    """
    path = study.find(name)
    declared, content = file.read(path), json_input.read(path, "study of claims")
    seeds = declared.quick_seeds if quick else declared.seeds
    own = Options(out=out)
    options = replace(own, seeds=_list(seeds))
    if quick:
        evals = declared.quick_evals
        options = replace(
            options,
            steps=str(declared.quick_steps),
            evals=None if evals is None else str(evals),
        )
    rates: dict[Place, float] = {}
    if quick:
        rates = {
            (arm, workload): grid[len(grid) // 2]
            for arm, grid in declared.rates.items()
            for workload in plan.WORKLOADS
        }
    made = study.lay_out(root, name, options, file.measured(content, rates))
    elsewhere = Elsewhere(made.out)
    made = replace(made, jobs=elsewhere.found(made.jobs))
    found = Phases(root, path, options, quick, declared, content, made, None, elsewhere)
    if quick or not declared.rates:
        return found
    rows, places = file.tuning(content)
    laid_out = study.lay_out(root, name, own, rows)
    found.tuning = replace(laid_out, jobs=elsewhere.found(laid_out.jobs))
    for job in found.tuning.jobs:
        for row in job.rows:
            arm, workload, rate = places[row - 1]
            found._places[job.run.run_dir] = ((arm, workload), rate, job.run.seed)
    for job in found.tuning.jobs:
        if progress.of(job.run.run_dir, job.run).state == progress.DONE:
            found.after(job)
    return found


def _list(seeds: Sequence[int]) -> str:
    return ",".join(map(str, seeds)) + ","


def table(choices: Mapping[Place, Choice], link: Callable[[Path], str]) -> list[str]:
    """The chosen rates, and the mean losses of the grids, each rate a ``link`` to its runs."""
    lines = [
        "| arm | mini | rate | mean loss of the grid | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (arm, mini), choice in choices.items():
        grid = ", ".join(
            f"[{rate:g}](<{link(choice.folders[rate])}>): {loss:.4g}"
            for rate, loss in choice.losses.items()
        )
        edge = "at the edge" if choice.at_edge else ""
        lines.append(f"| {arm} | {mini} | {choice.rate:g} | {grid} | {edge} |")
    return lines
