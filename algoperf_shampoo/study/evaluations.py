"""The evaluations of a run: ``eval_measurements.csv``, checked row by row.

A log of which a row breaks type, range or order is not counted, because nobody can tell what else
is wrong with it; each fault is named with its file and line. What is checked:

* steps are whole and rise; they may fall, or be there again, only where ``preemption_count`` rises
  (a resumed run goes back: rows after the step it went back to are of a lost branch);
* submission times are finite, not negative, and do not fall;
* the metric is a number in its range; what is not finite is no hit;
* the first evaluation is of step 1, as AlgoPerf's is, or those before it are lost;
* ``score`` is the submission time again, and ``measurements.csv`` holds the same evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from algoperf_shampoo.study import files

EVALS, MEASUREMENTS = "eval_measurements.csv", "measurements.csv"
STEP, TIME, COUNT, SCORE = (
    "global_step",
    "accumulated_submission_time",
    "preemption_count",
    "score",
)
MAX_STEP = 10**12
MAX_SECONDS = 1e9
"""Thirty years; what is longer was no run."""
_SAME = 1e-9  # relative: pandas rewrites a file with the last digits rounded


@dataclass(frozen=True)
class Metric:
    """Which way a metric goes, and the values it can have."""

    higher_is_better: bool
    least: float
    most: float

    def reaches(self, value: float, target: float) -> bool:
        """Whether a value is at the target or beyond; never for a value that is not finite."""
        if not math.isfinite(value):
            return False
        return value >= target if self.higher_is_better else value <= target


METRICS = {
    "accuracy": Metric(True, 0.0, 1.0),
    "bleu": Metric(True, 0.0, 100.0),
    "mean_average_precision": Metric(True, 0.0, 1.0),
    "ssim": Metric(True, -1.0, 1.0),
    "ctc_loss": Metric(False, 0.0, math.inf),
    "error_rate": Metric(False, 0.0, 1.0),
    "l1_loss": Metric(False, 0.0, math.inf),
    "loss": Metric(False, 0.0, math.inf),
    "ppl": Metric(False, 0.0, math.inf),
    "wer": Metric(False, 0.0, math.inf),
}
"""By AlgoPerf's ``target_metric_name``; its scoring has the same two lists of directions."""


@dataclass
class Holes:
    """What a log lacks. After a fault its run is not counted; a note is for the reader alone."""

    texts: list[str] = field(default_factory=list)
    faults: int = 0

    def note(self, text: str) -> None:
        self.texts.append(text)

    def fault(self, text: str) -> None:
        self.texts.append(text)
        self.faults += 1


@dataclass(frozen=True)
class Evaluation:
    """One row of ``eval_measurements.csv``: times in seconds, metric on the validation split."""

    step: int
    submission_time: float
    value: float
    row: dict[str, float] = field(repr=False, compare=False)


@dataclass(frozen=True)
class _Line:
    """An evaluation, where it stands, and the session it is of."""

    number: int
    evaluation: Evaluation
    session: int


def read_evaluations(folder: Path, metric: str, holes: Holes) -> list[Evaluation]:
    """The evaluations that count, in order; what is wrong with them goes to ``holes``."""
    # First, so that a run in progress cannot have evaluations there that are not here.
    others = _other_evaluations(folder, metric, holes)
    try:
        header, rows, problem = files.read_csv(folder / EVALS)
    except files.Missing:
        holes.fault(f"no {EVALS}")
        return []
    except files.Unreadable as reason:
        holes.fault(f"{EVALS} {reason}")
        return []
    column = f"validation/{metric}"
    missing = [name for name in (STEP, TIME, column) if name not in header]
    if missing:
        holes.fault(f"no column {', '.join(missing)} in {EVALS}")
        return []
    if problem:
        holes.fault(f"{EVALS} {problem}")
    lines = [
        _line(number, dict(zip(header, row, strict=True)), metric, holes) for number, row in rows
    ]
    read = [line for line in lines if line is not None]
    if not rows and not problem:
        holes.fault(f"{EVALS} has no evaluations below its header")
    if read and read[0].evaluation.step > 1:
        first = read[0].evaluation.step
        holes.fault(f"{EVALS} begins at step {first}: the evaluation after step 1 is not there")
    _compare([line.evaluation for line in read], others, column, holes)
    return _in_order(read, column, holes)


def spent_with_score(folder: Path) -> bool:
    """Whether ``measurements.csv`` ends in AlgoPerf's last row: the score alone, without a time."""
    try:
        header, rows, _ = files.read_csv(folder / MEASUREMENTS)
    except files.Unreadable:
        return False
    if not rows or SCORE not in header or TIME not in header:
        return False
    last = dict(zip(header, rows[-1][1], strict=True))
    score = files.number(last[SCORE])
    return score is not None and math.isfinite(score) and last[TIME] == ""


def _line(number: int, row: dict[str, str], metric: str, holes: Holes) -> _Line | None:
    """A row's evaluation, or None and a fault."""
    column = f"validation/{metric}"
    kind = METRICS[metric]
    session = _whole(row.get(COUNT, "0") or "0", MAX_STEP)
    step, spent, value = (
        _whole(row[STEP], MAX_STEP),
        files.number(row[TIME]),
        files.number(row[column]),
    )
    wrong: tuple[str, str] | None = None
    if step is None:
        wrong = STEP, f"not a whole number of 0 to {MAX_STEP:.0e}"
    elif spent is None or not 0 <= spent <= MAX_SECONDS:
        wrong = TIME, f"not a time of 0 to {MAX_SECONDS:.0e} s"
    elif session is None:
        wrong = COUNT, "not a count"
    elif value is None:
        wrong = column, "not a number"
    elif math.isfinite(value) and not kind.least <= value <= kind.most:
        wrong = column, f"outside {kind.least:g} to {kind.most:g}"
    elif SCORE in row and not _same(files.number(row[SCORE]), spent):
        wrong = SCORE, f"not {TIME}, {spent:g}"
    if wrong is not None or step is None or spent is None or value is None or session is None:
        name, why = wrong or (STEP, "")
        what = f"'{files.printable(row[name], 40)}'" if row[name] else "empty"
        holes.fault(f"{EVALS} line {number}: {name} is {what}: {why}")
        return None
    numbers = {key: math.nan if (n := files.number(v)) is None else n for key, v in row.items()}
    return _Line(number, Evaluation(step, spent, value, numbers), session)


def _in_order(lines: Sequence[_Line], column: str, holes: Holes) -> list[Evaluation]:
    kept: list[_Line] = []
    for line in lines:
        here = line.evaluation
        last = kept[-1] if kept else None
        where = f"{EVALS} line {line.number}"
        if last is not None and line.session < last.session:
            holes.fault(f"{where}: {COUNT} falls from {last.session} to {line.session}")
        elif last is not None and line.session > last.session:
            kept = _went_back(kept, here, holes)
        elif last is not None and here.step <= last.evaluation.step:
            how = "is there twice" if here.step == last.evaluation.step else "falls"
            holes.fault(
                f"{where}: {STEP} {how}: {here.step} after {last.evaluation.step}, though the run "
                "was not resumed in between"
            )
        elif last is not None and here.submission_time < last.evaluation.submission_time:
            holes.fault(
                f"{where}: {TIME} falls from {last.evaluation.submission_time:.1f} to "
                f"{here.submission_time:.1f} s while steps rise: was the clock set back?"
            )
        kept.append(line)
    odd = [line.evaluation for line in kept if not math.isfinite(line.evaluation.value)]
    if odd:
        # Empty is how pandas, and so AlgoPerf, writes nan.
        holes.note(
            f"{column} is not finite at {len(odd)} of {len(kept)} evaluations, the first at step "
            f"{odd[0].step}"
        )
    return [line.evaluation for line in kept]


def _went_back(kept: list[_Line], here: Evaluation, holes: Holes) -> list[_Line]:
    """The rows that a resumed run, which is at ``here`` now, has not done again."""
    left: list[_Line] = []
    lost: list[int] = []
    for line in kept:
        there = line.evaluation
        if there.step >= here.step or there.submission_time > here.submission_time:
            lost.append(there.step)
        else:
            left.append(line)
    if here.step in lost:
        holes.note(f"step {here.step} is there twice (a resumed run): the later row counts")
    others = sum(step != here.step for step in lost)
    if others:
        holes.note(
            f"{others} rows were done again by a resumed run, from step {here.step} on: the later "
            "rows count"
        )
    return left


def _other_evaluations(folder: Path, metric: str, holes: Holes) -> list[tuple[float, ...]]:
    """(step, time, value) of the evaluations in ``measurements.csv``, if there is one."""
    column = f"validation/{metric}"
    try:
        header, rows, problem = files.read_csv(folder / MEASUREMENTS)
    except files.Missing:
        return []
    except files.Unreadable as reason:
        holes.fault(f"{MEASUREMENTS} {reason}")
        return []
    if problem:
        holes.fault(f"{MEASUREMENTS} {problem}")
    if not {STEP, TIME, column} <= set(header):
        return []
    found = []
    places = [i for i, name in enumerate(header) if name.startswith("validation/")]
    for number, fields in rows:
        if not any(fields[i] for i in places):
            continue  # what the submission logged, or the score
        values = [files.number(fields[header.index(name)]) for name in (STEP, TIME, column)]
        if any(value is None for value in values):
            holes.fault(f"{MEASUREMENTS} line {number}: step, time or {column} is not a number")
            continue
        found.append(tuple(value for value in values if value is not None))
    return found


def _compare(
    own: Sequence[Evaluation], others: Sequence[tuple[float, ...]], column: str, holes: Holes
) -> None:
    """A fault where ``measurements.csv`` has an evaluation otherwise than the evaluations' file."""
    if holes.faults:
        return  # named already, and rows that were left out would be named again
    for place, (step, spent, value) in enumerate(others):
        if place >= len(own):
            lost = len(others) - len(own)
            holes.fault(
                f"{EVALS} lacks {lost} of the {len(others)} evaluations in {MEASUREMENTS}, the "
                f"first at step {step:.0f}"
            )
            return
        here = own[place]
        same = _same(step, here.step) and _same(spent, here.submission_time)
        if not same or not _same(value, here.value):
            holes.fault(
                f"{EVALS} and {MEASUREMENTS} disagree on evaluation {place + 1}: step {here.step}, "
                f"{here.submission_time:.1f} s, {column} {here.value:g} here and step {step:.0f}, "
                f"{spent:.1f} s, {value:g} there"
            )
            return


def _whole(text: str, most: int) -> int | None:
    value = files.number(text)
    if value is None or not 0 <= value <= most or value != int(value):
        return None
    return int(value)


def _same(one: float | None, other: float) -> bool:
    if one is None:
        return False
    both_nan = math.isnan(one) and math.isnan(other)
    return both_nan or math.isclose(one, other, rel_tol=_SAME, abs_tol=0.0)
