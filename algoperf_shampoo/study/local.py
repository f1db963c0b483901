"""Launch a study's runs on this machine, several at once, each with GPUs of its own."""

from __future__ import annotations

import functools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import gpus
from algoperf_shampoo.harness.algoperf import processes
from algoperf_shampoo.study import progress
from algoperf_shampoo.study.forks import Forked, Forks
from algoperf_shampoo.study.study import Job, Study

HIDDEN = ".study"
"""Folder of a study's own files, logs and scripts: nothing is read from it."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[str] | Forked
    reader: threading.Thread
    gpus: int
    log_start: int
    """Bytes that the log had before: lines of earlier launches."""


def run(
    study: Study,
    jobs: Sequence[Job],
    at_once: int | None,
    echo: Callable[[str], None],
    program: Sequence[str] | None = None,
    more: Callable[[Job], Sequence[Job]] = lambda ended: (),
    seconds: float | None = None,
    forks: Forks | None = None,
) -> int:
    """Run these jobs, the large ones first, to their ends; the number that failed.

    Args:
        at_once: how many at the same time; None: as many as there are GPUs for, one on a CPU.
        program: what takes a job's flags; ``scripts/submit.py`` by default.
        more: asked when a job is done, for jobs that can be run now; they come after the others.
        seconds: when these are over, what is under way is ended and nothing started any more.
        forks: jobs are forks of this server's, where one runs ``scripts/submit.py``.

    Raises:
        UserError: a job needs more GPUs than this machine has; none has been started then.
    """
    present = gpus.here()
    waiting = sorted(jobs, key=lambda job: -_need(job, len(present)))  # the large ones first
    for job in waiting[:1]:
        if _need(job, len(present)) > len(present) > 0 or (job.gpus and not present):
            raise UserError(
                f"{job.run.name}: needs {job.gpus} GPUs, this machine has {len(present)}; GPUS= "
                "sets another number, LAUNCHER=slurm another machine"
            )
    limit = at_once or (len(present) or 1)
    command = list(program or (sys.executable, str(study.root / "scripts" / "submit.py")))
    begin = functools.partial(_popen, command) if forks is None else functools.partial(_fork, forks)
    end = math.inf if seconds is None else time.monotonic() + seconds
    running: list[_Running] = []
    failed, told = 0, False
    try:
        while waiting or running:
            for entry in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(entry)
                failed += (ended_badly := _ended(entry, study, echo))
                waiting += [] if ended_badly else more(entry.job)
            if time.monotonic() > end:
                echo(
                    f"{seconds:g} seconds are over: {len(running)} runs under way are ended, "
                    f"{len(waiting)} have not begun"
                )
                break
            room = len(gpus.free(present)) if present else 0
            # A run that has just started may not have taken its GPUs yet.
            room = min(room, len(present) - sum(entry.gpus for entry in running))
            for job in list(waiting):
                need = _need(job, len(present))
                if len(running) >= limit or need > room:
                    if not running and not told:
                        told = True
                        echo(f"{job.run.name}: waits for {need} GPUs that no other run holds")
                    break
                waiting.remove(job)
                now = progress.of(job.run.run_dir, job.run)
                if now.over or now.state == progress.RUNNING:
                    failed += _by_another(job, now, echo)
                    waiting += more(job) if now.state == progress.DONE else []
                    continue
                running.append(_start(job, study, begin, need, echo))
                room -= need
            time.sleep(0.1)
    finally:
        for entry in running:
            entry.process.send_signal(signal.SIGTERM)
        for entry in running:
            entry.process.wait()
            entry.reader.join(timeout=10)
    return failed


def log_path(study: Study, job: Job) -> Path:
    """Where a job's output goes."""
    spec = job.run
    return study.out / HIDDEN / f"{spec.label}_{spec.workload}_seed{spec.seed}_{spec.trial}.log"


def _need(job: Job, present: int) -> int:
    """GPUs a job takes here: its number, else one (embedded) or all (AlgoPerf's)."""
    if job.gpus is not None or not present:
        return job.gpus or 0
    return 1 if dict(job.words)["HARNESS"] == "embedded" else present


def _popen(command: Sequence[str], job: Job, study: Study) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, *job.flags],
        cwd=study.root,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # A study that is killed takes its runs along, and finds them stopped when given again.
        preexec_fn=functools.partial(processes.die_with_parent, os.getpid()),
    )


def _fork(forks: Forks, job: Job, study: Study) -> Forked:
    return forks.start(study.root / "scripts" / "submit.py", job.flags)


def _start(
    job: Job,
    study: Study,
    begin: Callable[[Job, Study], subprocess.Popen[str] | Forked],
    need: int,
    echo: Callable[[str], None],
) -> _Running:
    path = log_path(study, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.stat().st_size if path.exists() else 0
    process = begin(job, study)

    def copy() -> None:
        assert process.stdout is not None
        with path.open("a", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if ": hit: " in line:
                    echo(line.rstrip("\n"))

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    echo(f"{job.run.name}: started" + (f" on {need} GPU{'s' * (need > 1)}" if need else ""))
    return _Running(job, process, reader, need, before)


def _ended(entry: _Running, study: Study, echo: Callable[[str], None]) -> int:
    """Say how a job ended; 1 if it failed."""
    entry.reader.join(timeout=10)
    now = progress.of(entry.job.run.run_dir, entry.job.run)
    name = entry.job.run.name
    if now.state == progress.DONE:
        missed = f"; {now.metric} {now.value:g} of {now.target:g}" if now.value is not None else ""
        how = "" if now.hit_step else f", a miss{missed}"
        if not entry.job.run.stop_at_target:
            how = ", all steps" if not now.note else f", {now.note}"
        echo(f"{name}: done at step {now.step}{how}")
        return 0
    if now.state == progress.RUNNING:
        return _by_another(entry.job, now, echo)
    code = entry.process.returncode or 0
    how = f"ended by {processes.signal_name(-code)}" if code < 0 else f"exit code {code}"
    lines = _lines(log_path(study, entry.job), entry.log_start)
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    why = errors[-1] if errors else now.note or (lines[-1] if lines else "no output")
    echo(f"{name}: {how}: {why}; see {log_path(study, entry.job)}")
    return 1


def _by_another(job: Job, now: progress.Progress, echo: Callable[[str], None]) -> int:
    """Say that another launch has a run, or has ended it; 1 if that does not count."""
    if now.state in (progress.DONE, progress.RUNNING):
        echo(f"{job.run.name}: {now.state} by another launch")
        return 0
    echo(f"{job.run.name}: {now.state}: {now.note}")
    return 1


def _lines(path: Path, start: int) -> list[str]:
    """Lines of a log from a byte on, without the empty ones."""
    with path.open("rb") as file:
        file.seek(start)
        text = file.read().decode("utf-8", errors="replace")
    return [line.strip() for line in text.split("\n") if line.strip()]
