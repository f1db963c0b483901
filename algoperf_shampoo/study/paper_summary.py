"""What the paper's summaries imply: ranks of runs of which only mean, error and number are known.

Of n values with mean m and standard error s none is further from m than (n - 1) s (Samuelson 1968).
Where these ranges of two rows do not meet, the ranks of all their runs are known, misses worst, and
the exact test of :mod:`.significance` applies. Else a test is not possible, and the hits alone are
compared (Fisher). Printed figures are rounded; the ranges are wide enough for what was rounded off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from algoperf_shampoo.study import significance

_ROUNDED = 0.5  # means and errors of steps are printed without decimals


@dataclass(frozen=True)
class Implied:
    """What two of the paper's rows say about each other.

    ``p`` is the exact two-sided p-value of the rank test, None where it is ``not_possible``, which
    is then the reason; ``fisher`` that of the hits alone, None where nothing was run.
    """

    p: float | None
    fisher: float | None
    not_possible: str
    text: str


def steps_range(entry: dict[str, Any], rounded: float = 0.0) -> tuple[float, float]:
    """Least and largest number of steps that a run which hits can have had."""
    error = entry["steps_se"] if entry["steps_se"] is not None else 0.0
    spread = (entry["hits"] - 1) * (error + rounded) + rounded
    return entry["steps_mean"] - spread, entry["steps_mean"] + spread


def compare(entry: dict[str, Any], reference: dict[str, Any]) -> Implied:
    """A row of the paper's against its reference row on the same workload."""
    if entry["hits"] is None or reference["hits"] is None:
        return Implied(None, None, "no runs", "not possible: no runs")
    counts = [(row["hits"], row["runs"]) for row in (entry, reference)]
    (hits, runs), (other_hits, other_runs) = counts
    fisher = significance.fisher(hits, runs, other_hits, other_runs)
    said = f"hits {hits}/{runs} against {other_hits}/{other_runs}, Fisher p = {_p(fisher)}"
    if runs == 1 or other_runs == 1:
        return Implied(None, fisher, "n = 1", "not possible: n = 1")
    if not hits or not other_hits:
        return Implied(None, fisher, "no steps", f"not possible: a row without hits; {said}")
    low, high = steps_range(entry, _ROUNDED)
    other_low, other_high = steps_range(reference, _ROUNDED)
    if low <= other_high and other_low <= high:
        reason = "the ranges of steps that the summaries allow meet"
        return Implied(None, fisher, reason, f"not possible: {reason}; {said}")
    values = [[mean] * n + [significance.MISS] * (total - n) for mean, n, total in (
        (entry["steps_mean"], hits, runs), (reference["steps_mean"], other_hits, other_runs)
    )]  # fmt: skip
    tests = significance.test([(values[0], values[1])])
    own, other = steps_range(entry), steps_range(reference)
    lower, upper = (own, other) if high < other_low else (other, own)
    whose = "its" if lower is own else "the reference's"
    text = (
        f"ranks separate ({whose} largest is at most {lower[1]:.0f}, the other's least at least "
        f"{upper[0]:.0f}): p = {_p(tests.difference)}; {said}"
    )
    return Implied(tests.difference, fisher, "", text)


def _p(value: float) -> str:
    return f"{value:.2g}"
