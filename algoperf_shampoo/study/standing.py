"""Where a run stands against an earlier or published one: steps and time at the same metric value.

The value is the best that the run has reached so far; its rival's step and time are those at which
it reached that value first, interpolated between the evaluations at which it got better. Both times
are submission time, each on its own machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.spec import MINI, MINIDATA, RunSpec
from algoperf_shampoo.study import logs, trust
from algoperf_shampoo.study.evaluations import METRICS, Evaluation
from algoperf_shampoo.study.logs import Trial


class DamagedRival(UserError):
    """The run to stand against is not what was measured."""


@dataclass(frozen=True)
class Point:
    """A metric value, and the step and submission time (seconds) at which it was reached."""

    step: float
    seconds: float
    value: float


@dataclass(frozen=True)
class Rival:
    """A run to stand against: ``points`` of its evaluations that were better than all before."""

    name: str
    workload: str
    metric: str
    points: tuple[Point, ...]

    def at(self, value: float) -> Point | None:
        """Where it reached a value first; None if it never did. Its first evaluation counts for
        all that it was past by then."""
        better = METRICS[self.metric].reaches
        place = next((i for i, p in enumerate(self.points) if better(p.value, value)), None)
        if place is None:
            return None
        after = self.points[place]
        if place == 0 or after.value == value:
            return Point(after.step, after.seconds, value)
        before = self.points[place - 1]
        share = (value - before.value) / (after.value - before.value)
        return Point(
            before.step + share * (after.step - before.step),
            before.seconds + share * (after.seconds - before.seconds),
            value,
        )


@dataclass(frozen=True)
class Standing:
    """The run's best value and where it reached it (``here``); its rival there, None for never."""

    rival: Rival
    here: Point
    there: Point | None

    def line(self) -> str:
        """All of it, for a line of a run's progress."""
        where = f"{self.rival.metric} {self.here.value:.4f} here {_where(self.here)}"
        if self.there is None:
            best = self.rival.points[-1]
            return (
                f"against {self.rival.name}: {where}, never there (best {best.value:.4f} "
                f"{_where(best)})"
            )
        return f"against {self.rival.name}: {where}, there {_where(self.there)}: {self.ratios()}"

    def short(self) -> str:
        """``-12% steps, +3% time``."""
        if self.there is None:
            return "never there"
        parts = [(self.here.step, self.there.step), (self.here.seconds, self.there.seconds)]
        shown = [f"{100 * (a / b - 1):+.0f}%" if b > 0 else "?" for a, b in parts]
        return f"{shown[0]} steps, {shown[1]} time"

    def ratios(self) -> str:
        """``12% fewer steps, 3% more time``, or that the rival was never there."""
        if self.there is None:
            return "never there"
        here, there = self.here, self.there
        steps = _ratio(here.step, there.step, "fewer steps", "more steps", "as many steps")
        seconds = _ratio(here.seconds, there.seconds, "less time", "more time", "as much time")
        return f"{steps}, {seconds}"


def choose(folder: Path, run: RunSpec) -> Rival:
    """The run of a folder to stand against: of the same workload, of the same seed if there is one.

    A run of another size of the workload is taken where there is none of the same, and said.

    Raises:
        UserError: the folder holds no run of the workload that can be read.
        DamagedRival: the run has been damaged since it was written.
    """
    where = f"AGAINST={folder}"
    if not folder.is_dir():
        raise UserError(f"{where}: no such folder of runs")
    trials = [logs.read_trial(folder)] if logs.is_trial(folder) else logs.find_trials([folder])
    fitting = [t for t in trials if _base(t.workload) == _base(run.workload)]
    fitting = [t for t in fitting if t.path != run.run_dir.absolute()]
    usable = [t for t in fitting if t.metric in METRICS and _points(t.metric, t.evaluations)]
    if not usable:
        reasons = fitting[0].holes[:1] if fitting else []
        names = ", ".join(sorted({t.workload for t in trials})) or "none"
        known = "; ".join(reasons) or f"runs there: {names}"
        raise UserError(f"{where}: no run of {_base(run.workload)} with evaluations ({known})")
    usable.sort(key=lambda t: (t.workload != run.workload, t.seed != run.seed))
    if why := trust.damage(usable[0]):
        raise DamagedRival(f"{where}: {usable[0].path}: damaged: {why}; name another run")
    return _rival(usable[0], run)


def choose_each(folder: Path, runs: Sequence[RunSpec]) -> dict[Path, Rival]:
    """The rival of each run by its folder; a run of a workload that has none is not there.

    Raises:
        UserError: no run has a rival, or the rival of one is damaged.
    """
    found: dict[Path, Rival] = {}
    reason: UserError | None = None
    for run in runs:
        try:
            found[run.run_dir] = choose(folder, run)
        except DamagedRival:
            raise
        except UserError as error:
            reason = reason or error
    if reason is not None and not found:
        raise reason
    return found


def of(run_dir: Path, rival: Rival) -> Standing | None:
    """Where a run stands by its folder; None before its first evaluation."""
    if not logs.is_trial(run_dir):
        return None
    points = _points(rival.metric, logs.read_trial(run_dir).evaluations)
    return Standing(rival, points[-1], rival.at(points[-1].value)) if points else None


def teller(folder: Path | None, runs: Sequence[RunSpec]) -> Callable[[Path, str], str | None]:
    """What a harness asks after each evaluation, with every run's rival chosen beforehand.

    Raises:
        UserError: see :func:`choose_each`.
    """
    rivals = choose_each(folder, runs) if folder is not None else {}

    def tell(run_dir: Path, name: str) -> str | None:
        rival = rivals.get(run_dir)
        found = of(run_dir, rival) if rival is not None else None
        return f"{name}: {found.line()}" if found is not None else None

    return tell


def _rival(trial: Trial, run: RunSpec) -> Rival:
    other = "" if trial.workload == run.workload else f", {trial.workload}, another size"
    number = f" trial {trial.trial}" if trial.trial != 1 else ""
    metric = str(trial.metric)
    return Rival(
        name=f"{trial.label} {trial.study}{number}{other}",
        workload=trial.workload,
        metric=metric,
        points=_points(metric, trial.evaluations),
    )


def _points(metric: str, evaluations: Sequence[Evaluation]) -> tuple[Point, ...]:
    """The evaluations that were better than all before; what is not finite is none."""
    sign = 1.0 if METRICS[metric].higher_is_better else -1.0
    points: list[Point] = []
    for e in evaluations:
        if math.isfinite(e.value) and (not points or sign * e.value > sign * points[-1].value):
            points.append(Point(e.step, e.submission_time, e.value))
    return tuple(points)


def _base(workload: str) -> str:
    return workload.removesuffix(MINI).removesuffix(MINIDATA)


def _where(point: Point) -> str:
    return f"at step {point.step:.0f}, {point.seconds:.1f} s"


def _ratio(here: float, there: float, less: str, more: str, same: str) -> str:
    if there <= 0:
        return more
    percent = round(100 * (here / there - 1))
    if percent == 0:
        return same
    # "3 times" says more than "200%".
    if percent >= 200:
        return f"{here / there:.1f} times the {more.split()[-1]}"
    return f"{abs(percent)}% {less if percent < 0 else more}"
