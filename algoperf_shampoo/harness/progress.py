"""What a run says of itself: how far it is, how long it may take, how it ended."""

from __future__ import annotations

from typing import Any

from algoperf_shampoo.harness.spec import ALL_STEPS_DONE


class Clock:
    """Estimates the wall time that a session of a run has left at most.

    The rate is that of all evaluations but the first: the first step's compiling and warming up
    come once. A run ends earlier if it reaches its targets.
    """

    def __init__(self, max_steps: int | None, max_seconds: float) -> None:
        """``max_seconds``: the budget of submission time."""
        self._max_steps, self._max_seconds = max_steps, max_seconds
        self._first: tuple[int, float, float] | None = None

    def left(self, step: int, spent: float, now: float) -> float | None:
        """Seconds of wall time until a budget is spent; None at the first call.

        Args:
            step: steps done; spent: submission time so far; now: a clock, in seconds.
        """
        if self._first is None:
            self._first = (step, spent, now)
            return None
        first_step, first_spent, first_now = self._first
        wall = now - first_now
        limits = []
        if self._max_steps is not None and step > first_step:
            limits.append((self._max_steps - step) * wall / (step - first_step))
        if spent > first_spent:
            limits.append((self._max_seconds - spent) * wall / (spent - first_spent))
        return max(0.0, min(limits)) if limits else None


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def line(workload: Any, row: dict[str, Any], step: int, left: float | None, reached: bool) -> str:
    """One evaluation: step, metric against target, seconds spent, and seconds left at most.

    ``row`` is a row of the evaluations' CSV; ``reached``, whether the validation target is hit.
    """
    metric, limit = workload.target_metric_name, workload.max_steps
    parts = [
        f"step {step}{f'/{limit}' if limit else ''}",
        f"{metric} {row[f'validation/{metric}']:.4f} "
        f"(target {workload.validation_target_value:.4f}{', reached' if reached else ''})",
        f"{row['accumulated_submission_time']:.1f} s",
    ]
    if left is not None:
        parts.append(f"at most {duration(left)} left")
    return " | ".join(parts)


def summary(result: dict[str, Any]) -> str:
    """One line for a run that has ended."""
    steps, hit = result["global_step"], result["steps_to_target"]
    diverged = result.get("diverged_at_step")
    ended = result["stop_reason"] + (f"; diverged at step {diverged}" if diverged else "")
    if hit is None:
        return f"target not reached in {steps} steps ({ended})"
    text = f"target reached at step {hit}, {result['time_to_target']:.1f} s of submission time"
    if steps > hit:
        why = "the test target" if result["stop_reason"] != ALL_STEPS_DONE else "all steps"
        text += f"; it went on to step {steps} for {why}"
    return f"{text} ({ended})"
