"""The numbers that claims are about, each read from the folder of one run.

A number that is not finite, and that of a run which diverged, is ``math.inf``: the worst there is.
So is a loss that is not above 0, whose logarithm is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo.harness.step_norms import SLOPE
from algoperf_shampoo.study import files
from algoperf_shampoo.study.logs import Trial

LOSSES, MEASUREMENTS = "step_losses.csv", "measurements.csv"
_CHECKS, _REFRESHES = "eigenbasis_checks", "eigenbasis_refreshes"


@dataclass(frozen=True)
class Statistic:
    """``of`` (run folder, steps of the budget) is the number; ``logarithmic``: positive, compared
    by ratios; ``what`` says it in words."""

    what: str
    logarithmic: bool
    of: Callable[[Path, int], float]


def of_run(trial: Trial, name: str, steps: int) -> float:
    """A statistic of a run of all steps that has ended.

    Raises:
        Unreadable: the file that has it is not there, or lacks a loss: such a run is no worst one.
    """
    if trial.diverged:
        return math.inf
    statistic = STATISTICS[name]
    try:
        value = statistic.of(trial.path, steps)
    except files.Missing:
        raise files.Unreadable(f"no file that has the {statistic.what}") from None
    usable = math.isfinite(value) and not (statistic.logarithmic and value <= 0)
    return value if usable else math.inf


def last_tenth_loss(folder: Path, steps: int) -> float:
    """Mean training loss over the last tenth of the steps.

    Raises:
        Unreadable: the file of losses, or one of these, is not there.
    """
    first = steps - max(1, steps // 10)
    header, rows, _ = files.read_csv(folder / LOSSES)
    if not {"global_step", "loss"} <= set(header):
        raise files.Unreadable(f"{LOSSES} has no columns global_step and loss")
    columns = [header.index("global_step"), header.index("loss")]
    losses = {}
    for _, row in rows:
        step, loss = (files.number(row[column]) for column in columns)
        if step is not None and loss is not None and first < step <= steps:
            losses[int(step)] = loss
    if len(losses) != steps - first:
        raise files.Unreadable(
            f"{LOSSES} has {len(losses)} of the {steps - first} losses of the last tenth"
        )
    return math.fsum(losses.values()) / len(losses)


def loss_curve(folder: Path, width: int) -> dict[float, float]:
    """Mean training loss of ``width`` steps after another, by the last of them; finite ones."""
    header, rows, _ = files.read_csv(folder / LOSSES)
    columns = [header.index(name) for name in ("global_step", "loss")]
    windows: dict[int, list[float]] = {}
    for _, row in rows:
        step, loss = (files.number(row[column]) for column in columns)
        if step is not None and loss is not None and math.isfinite(loss):
            windows.setdefault(math.ceil(step / width) * width, []).append(loss)
    return {step: math.fsum(values) / len(values) for step, values in sorted(windows.items())}


def refresh_share(folder: Path, steps: int) -> float:
    """Eigendecompositions over checks, of all factors over the whole run."""
    counts = _counts(folder)
    return _share(counts, 0, steps)


KINDS = ("one_dim", "left", "right")
"""Of factors, as the submission counts them: of 1-D blocks (the paper's A), of the first dimension
of others (L), of their last (R)."""
OF_KINDS = ("refresh_left_less_one_dim", "refresh_right_less_left")
"""The statistics that compare them."""


def refresh_late_less_early(folder: Path, steps: int) -> float:
    """:func:`refresh_share` of the last quarter of the steps less that of the first quarter.

    Counts are of evaluations: where none is at a quarter, the two parts are longer, up to the next
    evaluation and from the one before.
    """
    counts = _counts(folder)
    early = min((step for step in counts if step >= steps / 4), default=-1)
    late = max((step for step in counts if step <= 3 * steps / 4), default=-1)
    return _share(counts, late, steps) - _share(counts, 0, early)


def share_of_kinds(first: str, second: str) -> Callable[[Path, int], float]:
    """:func:`refresh_share` of the second kind of factor less that of the first."""

    def difference(folder: Path, steps: int) -> float:
        return _share(_counts(folder, second), 0, steps) - _share(_counts(folder, first), 0, steps)

    return difference


def step_norm_slope(folder: Path, steps: int) -> float:
    """Slope of log(||Shampoo|| / ||Adam||) on log(mn) at the last step (:mod:`..step_norms`)."""
    header, rows, _ = files.read_csv(folder / MEASUREMENTS)
    if not {"global_step", SLOPE} <= set(header):
        return math.nan
    columns = [header.index(name) for name in ("global_step", SLOPE)]
    found = [[files.number(row[column]) for column in columns] for _, row in rows]
    there = (s for step, s in found if step == steps and s is not None and math.isfinite(s))
    return next(there, math.nan)


def shares_between(folder: Path, kind: str = "") -> dict[float, float]:
    """Eigendecompositions over checks between two evaluations, by the step of the later one; of one
    kind of factor, or of all."""
    counts = _counts(folder, kind)
    steps = sorted(counts)
    found = {b: _share(counts, a, b) for a, b in zip(steps, steps[1:], strict=False)}
    return {step: share for step, share in found.items() if math.isfinite(share)}


def _counts(folder: Path, kind: str = "") -> dict[int, tuple[float, float]]:
    """Checks and refreshes up to a step, as the submission logs them at evaluations; of one kind
    of factor (:func:`..submission._by_kind`), or of all."""
    header, rows, _ = files.read_csv(folder / MEASUREMENTS)
    ending = f"_{kind}" if kind else ""
    names = ["global_step", _CHECKS + ending, _REFRESHES + ending]
    if not set(names) <= set(header):
        return {}
    columns = [header.index(name) for name in names]
    counts = {0: (0.0, 0.0)}
    for _, row in rows:
        step, *both = (files.number(row[column]) for column in columns)
        finite = [value for value in both if value is not None and math.isfinite(value)]
        if step is not None and math.isfinite(step) and len(finite) == 2:
            counts[int(step)] = (finite[0], finite[1])
    return counts


def _share(counts: dict[int, tuple[float, float]], start: int, end: int) -> float:
    """Refreshes over checks in (start, end]; nan where there is no count of a step, or no check."""
    if start not in counts or end not in counts:
        return math.nan
    checks, refreshes = (b - a for a, b in zip(counts[start], counts[end], strict=True))
    return refreshes / checks if checks > 0 else math.nan


STATISTICS = {
    "loss": Statistic("mean training loss of the last tenth of the steps", True, last_tenth_loss),
    "refresh_share": Statistic("eigendecompositions over checks", False, refresh_share),
    "refresh_late_less_early": Statistic(
        "eigendecompositions over checks, last quarter of the steps less first quarter",
        False,
        refresh_late_less_early,
    ),
    "refresh_left_less_one_dim": Statistic(
        "eigendecompositions over checks, left factors less those of 1-D blocks",
        False,
        share_of_kinds("one_dim", "left"),
    ),
    "refresh_right_less_left": Statistic(
        "eigendecompositions over checks, right factors less left ones",
        False,
        share_of_kinds("left", "right"),
    ),
    "step_norm_slope": Statistic(
        "slope of log(norm of Shampoo's step / Adam's) on log(mn) over matrices, last step",
        False,
        step_norm_slope,
    ),
}
