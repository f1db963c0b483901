"""How far a run is, from its folder alone: done, running, stopped, failed, missing,
damaged, or another run's.

Nothing is kept beside the run folders, so nothing can disagree with them. Whether a run is going on
is what its lock says (:mod:`..harness.run_lock`), whose other holders may be on another machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo import paths, versions
from algoperf_shampoo.harness import run_lock, spec
from algoperf_shampoo.harness.algoperf import folder
from algoperf_shampoo.harness.spec import RunSpec
from algoperf_shampoo.study import files, logs, trust

DONE, RUNNING, STOPPED, FAILED, MISSING = "done", "running", "stopped", "failed", "missing"
DAMAGED, OTHER = "damaged", "another run's"
"""Of a run whose files are not what was written, and of a finished one that is not the one wanted:
neither is done, and what they say is not counted."""
FAILURE = ".failure.json"
_RECORD = "run.json"


@dataclass(frozen=True)
class Progress:
    """One run. ``value`` is the validation metric at ``step``, the last evaluation.

    ``fraction`` is the part of the budget that is spent, of steps or of submission time, whichever
    is more; ``seconds_left`` what the rest takes in wall time at the pace so far, if it does not
    reach its target before. Both are None before the first evaluation. ``hit_step`` and
    ``hit_seconds`` are of the first evaluation that reached the target. ``note`` says why a run has
    stopped or failed, or is not counted. ``over``: it has ended, whatever is wrong with its folder:
    launching it again trains nothing.
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
    over: bool = False
    standing: str = ""
    """Where it stands against a chosen run (:mod:`.standing`)."""


def of(run_dir: Path, run: RunSpec | None = None) -> Progress:
    """Read a run's folder. A run that another process is writing is read as it was a moment ago.

    Args:
        run: what the folder is to hold; None: whatever it does.
    """
    try:
        return _of(run_dir, run)
    except OSError as error:
        return Progress(DAMAGED, note=paths.complaint(error))


def _of(run_dir: Path, run: RunSpec | None) -> Progress:
    if not run_dir.is_dir():
        return Progress(MISSING)
    # Asked first: what ends between this and the reading below shows as running once more.
    running = run_lock.held(run_dir)
    odd: list[str] = []
    record, launches = _read(run_dir / _RECORD, odd), _read(run_dir / folder.LAUNCHES, odd)
    broken = bool(odd)
    # No launch goes on from these: it would refuse, or wait for a pipe for ever.
    hopeless = any(text.startswith(_RECORD) or text.endswith("regular file") for text in odd)
    failure = _read(run_dir / FAILURE, odd)
    state, note = _state(running, record, launches, failure)
    if broken and state != RUNNING:
        state, note = DAMAGED, ""
    elif state == MISSING:
        if not odd:
            return Progress(MISSING)
        state = FAILED
    if not logs.is_trial(run_dir):
        text = "; ".join([note, *odd] if note else odd)
        return Progress(state, note=text, over=state == DONE or (broken and hopeless))
    trial = logs.read_trial(run_dir)
    last = trial.evaluations[-1] if trial.evaluations else None
    hit = trust.first_hit(trial)
    fraction, left = _rest(run_dir, trial, last, odd)
    over = state == DONE
    if broken and state == DAMAGED:
        over = hopeless
    elif over and run is not None and (why := trust.another(run, trial)):
        state, note = OTHER, why
    elif over and (why := trust.damage(trial)):
        state, note = DAMAGED, why
    elif state in (STOPPED, FAILED) and hit and trial.outcome == "unknown":
        state, note = DAMAGED, "; ".join(trial.holes)
    if state in (DAMAGED, OTHER):
        hit = None
    # What a reason says already is not said twice.
    note = "; ".join([*([note] if note else []), *(text for text in odd if text not in note)])
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
        over=over,
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
        if how is not None and not isinstance(how, str):
            return DAMAGED, f"{folder.LAUNCHES}: how is {_short(how)}, not a text"
        if how is None:
            return STOPPED, "launcher killed"
        if how.startswith("finished"):
            return DONE, ""
        return (STOPPED if how.startswith(("stopped", "launcher killed")) else FAILED), how
    if isinstance(failure, dict):
        return FAILED, str(failure.get("error", ""))
    return (STOPPED, "killed or stopped") if isinstance(record, dict) else (MISSING, "")


def _rest(
    run_dir: Path, trial: logs.Trial, last: logs.Evaluation | None, odd: list[str]
) -> tuple[float | None, float | None]:
    """Part of the budget spent, and seconds of wall time for the rest of it.

    What is wrong with the files that say the budget is added to ``odd``.
    """
    limit = _newest(run_dir, "flags_", "max_global_steps", odd)
    budget = _newest(run_dir, "meta_data_", "workload.max_allowed_runtime_sec", odd)
    if last is None:
        return None, None
    parts = []
    if limit is not None:
        parts.append(last.step / limit)
    if budget is not None and trial.to_target:
        budget *= versions.self_tuning_factor(trial.version) if trial.ruleset == "self" else 1.0
        parts.append(last.submission_time / budget)
    if not parts:
        return None, None
    fraction = min(1.0, max(parts))
    spent = last.row.get("total_duration")
    if not fraction or spent is None or spent != spent:
        return fraction, None
    return fraction, spent * (1 - fraction) / fraction


def _newest(run_dir: Path, start: str, key: str, odd: list[str]) -> float | None:
    """A number above 0 of the newest file of a kind; None where it says none."""
    names = files.numbered(os.listdir(run_dir), start)
    content = _read(run_dir / names[-1], odd, listed=True) if names else None
    value = content.get(key) if isinstance(content, dict) else None
    if value is None:
        return None
    number = files.finite(value)
    if number is None or number <= 0:
        odd.append(f"{names[-1]}: {key} is {_short(value)}, not a number above 0")
        return None
    return number


def _read(path: Path, odd: list[str], listed: bool = False) -> Any:
    """What a JSON file holds, None if it cannot be had: then ``odd`` is given the reason.

    ``listed``: its name is in the folder, so that it leads nowhere if it is not there.
    """
    try:
        return files.read_json_value(path)
    except files.Missing as reason:
        if listed or path.is_symlink():
            odd.append(f"{path.name} {reason}")
    except files.Unreadable as reason:
        odd.append(f"{path.name} {reason}")
    return None


def _short(value: Any) -> str:
    return files.printable(json.dumps(value), 60)
