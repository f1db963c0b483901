"""How far a run is, from its folder alone: done, running, stopped, failed or missing.

Nothing is kept beside the run folders, so nothing can disagree with them. Whether a run is going on
is what its lock says (:mod:`..harness.run_lock`), whose other holders may be on another machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo import versions
from algoperf_shampoo.harness import run_lock, spec
from algoperf_shampoo.harness.algoperf import folder
from algoperf_shampoo.study import logs
from algoperf_shampoo.study.evaluations import METRICS

DONE, RUNNING, STOPPED, FAILED, MISSING = "done", "running", "stopped", "failed", "missing"
FAILURE = ".failure.json"
_RECORD = "run.json"


@dataclass(frozen=True)
class Progress:
    """One run. ``value`` is the validation metric at ``step``, the last evaluation.

    ``fraction`` is the part of the budget that is spent, of steps or of submission time, whichever
    is more; ``seconds_left`` what the rest takes in wall time at the pace so far, if it does not
    reach its target before. Both are None before the first evaluation. ``hit_step`` and
    ``hit_seconds`` are of the first evaluation that reached the target. ``note`` says why a run has
    stopped or failed.
    """

    state: str
    step: int | None = None
    metric: str | None = None
    value: float | None = None
    target: float | None = None
    hit_step: int | None = None
    hit_seconds: float | None = None
    fraction: float | None = None
    seconds_left: float | None = None
    note: str = ""
    standing: str = ""
    """Where it stands against a chosen run (:mod:`.standing`)."""


def of(run_dir: Path) -> Progress:
    """Read a run's folder. A run that another process is writing is read as it was a moment ago."""
    if not run_dir.is_dir():
        return Progress(MISSING)
    # Asked first: what ends between this and the reading below shows as running once more.
    running = run_lock.held(run_dir)
    record, launches = _read(run_dir / _RECORD), _read(run_dir / folder.LAUNCHES)
    failure = _read(run_dir / FAILURE)
    state, note = _state(running, record, launches, failure)
    if state == MISSING:
        return Progress(MISSING)
    if not logs.is_trial(run_dir):
        return Progress(state, note=note)
    trial = logs.read_trial(run_dir)
    last = trial.evaluations[-1] if trial.evaluations else None
    hit = _hit(trial)
    fraction, left = _rest(run_dir, trial, last) if last else (None, None)
    return Progress(
        state=state,
        step=last.step if last else None,
        metric=trial.metric,
        value=last.value if last else None,
        target=trial.target,
        hit_step=hit.step if hit else None,
        hit_seconds=hit.submission_time if hit else None,
        fraction=1.0 if state == DONE else fraction,
        seconds_left=left if state in (RUNNING, STOPPED, FAILED) else None,
        note=note,
    )


def hit_line(name: str, now: Progress) -> str | None:
    """The line to print when a target has been reached, None if it has not."""
    if now.hit_step is None or now.hit_seconds is None or now.target is None:
        return None
    return spec.hit_line(name, str(now.metric), now.target, now.hit_step, now.hit_seconds)


def hit_line_of(run_dir: Path, name: str) -> str | None:
    """The same, from the folder of the run called ``name``."""
    return hit_line(name, of(run_dir))


@contextmanager
def noting_failure(run_dir: Path) -> Iterator[None]:
    """Keep in the folder why an attempt failed, until the next one begins (embedded harness)."""
    with suppress(FileNotFoundError):
        (run_dir / FAILURE).unlink()
    try:
        yield
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        with suppress(OSError):  # a full disk may be what it failed of
            run_dir.mkdir(parents=True, exist_ok=True)
            temporary = run_dir / f"{FAILURE}.tmp"
            temporary.write_text(json.dumps({"error": text}) + "\n", encoding="utf-8")
            temporary.replace(run_dir / FAILURE)
        raise


def _state(running: bool, record: Any, launches: Any, failure: Any) -> tuple[str, str]:
    if isinstance(record, dict) and record.get("status") in ("finished", "diverged"):
        return DONE, "diverged" if record["status"] == "diverged" else ""
    if running:
        return RUNNING, ""
    last = launches[-1] if isinstance(launches, list) and launches else None
    if isinstance(last, dict):
        how = folder.how_it_ended(last)
        if how is None:
            return STOPPED, "launcher killed"
        if how.startswith("finished"):
            return DONE, ""
        return (STOPPED if how.startswith(("stopped", "launcher killed")) else FAILED), how
    if isinstance(failure, dict):
        return FAILED, str(failure.get("error", ""))
    return (STOPPED, "killed or stopped") if isinstance(record, dict) else (MISSING, "")


def _hit(trial: logs.Trial) -> logs.Evaluation | None:
    """The first evaluation at the target, of a run that is still going on too."""
    if trial.target is None or trial.metric not in METRICS:
        return None
    reaches, target = METRICS[trial.metric].reaches, trial.target
    return next((e for e in trial.evaluations if reaches(e.value, target)), None)


def _rest(run_dir: Path, trial: logs.Trial, last: logs.Evaluation) -> tuple[float | None, Any]:
    """Part of the budget spent, and seconds of wall time for the rest of it."""
    parts = []
    if limit := _newest(run_dir, "flags_*.json").get("max_global_steps"):
        parts.append(last.step / limit)
    budget = _newest(run_dir, "meta_data_*.json").get("workload.max_allowed_runtime_sec")
    if budget and trial.to_target:
        budget *= versions.self_tuning_factor(trial.version) if trial.ruleset == "self" else 1.0
        parts.append(last.submission_time / budget)
    if not parts:
        return None, None
    fraction = min(1.0, max(parts))
    spent = last.row.get("total_duration")
    if not fraction or spent is None or spent != spent:
        return fraction, None
    return fraction, spent * (1 - fraction) / fraction


def _newest(run_dir: Path, pattern: str) -> dict[str, Any]:
    paths = sorted(run_dir.glob(pattern), key=lambda path: path.stat().st_mtime)
    content = _read(paths[-1]) if paths else None
    return content if isinstance(content, dict) else {}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
