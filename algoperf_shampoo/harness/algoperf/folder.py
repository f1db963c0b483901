"""A trial folder that AlgoPerf's runner wrote: may it be resumed, and is it fit to be?

The runner resumes whatever it finds: it takes the hyperparameters from the folder's hparams.json
instead of the search space, fails on a checkpoint cut short by a kill, does no step at all when the
run had ended by its step limit, and writes the rows of repeated steps a second time. All of that is
settled here, before it starts; nothing is deleted, what is in the way is set aside.
"""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk, run_lock, seal
from algoperf_shampoo.harness.algoperf import tables
from algoperf_shampoo.harness.spec import RunSpec

LAUNCHES = "launches.json"
SEARCH_SPACE = "search_space.json"
HPARAMS = "hparams.json"
CONSOLE = "console.log"
ENTRY = "entry"
"""Folder of a self-tuning run's submission: the copy that it runs, its point built in."""
_CHECKPOINT = re.compile(r"checkpoint_(\d+)$")


@dataclass(frozen=True)
class State:
    """What a trial folder holds. ``checkpoint`` is the newest readable one's facts, or None."""

    run_dir: Path
    checkpoint: dict[str, Any] | None
    unreadable: tuple[Path, ...]

    @property
    def step(self) -> int:
        """Step that a launch goes on from."""
        return self.checkpoint["global_step"] if self.checkpoint else 0

    @property
    def ended(self) -> str | None:
        """Why the run is over for AlgoPerf, None if it is not."""
        if self.checkpoint is None:
            return None
        if self.checkpoint["goals_reached"]:
            return "both targets reached"
        if not self.checkpoint["is_time_remaining"]:
            return "time budget spent"
        if self.checkpoint["training_complete"]:
            return "step limit reached"
        return None


def checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints in the folder, newest first."""
    found = []
    for path in run_dir.glob("checkpoint_*") if run_dir.is_dir() else ():
        match = _CHECKPOINT.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]


def steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints in the folder, newest first, readable or not."""
    return [int(path.name.removeprefix("checkpoint_")) for path in checkpoints(run_dir)]


def fingerprint(run_dir: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of change of the checkpoints: whether they are still the same."""
    found = []
    for path in checkpoints(run_dir):
        try:
            status = path.stat()
        except FileNotFoundError:  # removed by a run under way
            continue
        found.append((path.name, status.st_size, status.st_mtime_ns))
    return tuple(found)


def examine(run: RunSpec, facts: dict[str, dict[str, Any]], max_steps: int | None) -> State:
    """Compare a trial folder with the run that is to go into it. Writes nothing.

    Args:
        facts: of the checkpoints, by path, as :func:`.probe.checkpoint` gives them.
        max_steps: the step limit now, None for none.

    Raises:
        UserError: the folder is of another run, or of one that AlgoPerf cannot continue.
    """
    own = checkpoints(run.run_dir)
    readable = [path for path in own if facts.get(str(path), {}).get("readable")]
    newest = facts[str(readable[0])] if readable else None
    broken = tuple(own[: own.index(readable[0])] if readable else own)
    state = State(run.run_dir, newest, broken)
    if (run.run_dir / "run.json").exists():
        raise UserError(f"{run.run_dir}: holds a run of the embedded harness; set OUT=")
    _same_hparams(run)
    if state.ended:
        _check_intact(run.run_dir)
    if state.checkpoint is None:
        count, step, spent = tables.last_evaluation(run.run_dir)
        if count > 1:
            gone = f"its checkpoints are {'damaged' if broken else 'gone'}"
            raise UserError(
                f"{run.run_dir}: {gone}, and AlgoPerf would start over with its clock at 0, though "
                f"{spent:.1f} s in {step} steps are spent; put a checkpoint back, or set OUT="
            )
    if state.ended == "step limit reached" and (max_steps is None or max_steps > state.step):
        raise UserError(
            f"{run.run_dir}: ended at step {state.step} by its step limit, and AlgoPerf does no "
            "further step of such a run; set OUT= to another folder for a longer one"
        )
    return state


def prepare(run: RunSpec, state: State, points: list[dict[str, Any]]) -> list[str]:
    """Make the folder fit to start or resume from; the lines to tell the user.

    ``points`` are the search space up to this trial, written there as the runner's input.
    """
    disk.make_folders(run.run_dir)
    notes = []
    for path in state.unreadable:
        notes.append(f"{path.name} cannot be read (a save was cut short?): set aside")
        disk.set_aside(path)
    # What was cut short says nothing; the launch that comes writes its own.
    for pattern in (HPARAMS, "meta_data_*.json", "flags_*.json"):
        for path in sorted(run.run_dir.glob(pattern)):
            if _read_json(path) is None:
                notes.append(f"{path.name} cannot be read: set aside")
                disk.set_aside(path)
    notes += tables.bring_to(run.run_dir, state.checkpoint)
    if run.ruleset == "external":
        write_json(run.run_dir / SEARCH_SPACE, points)
    # Left to the runner, rank 0 writes it while the others look for it, and one that finds half of
    # it dies. With a point built in the runner would write none.
    if not (run.run_dir / HPARAMS).exists():
        write_json(run.run_dir / HPARAMS, run.hparams)
    return notes


def keep_checkpoint(run_dir: Path, keep: int = 2) -> None:
    """Bring what the runner has just written to disk, then remove all but the newest checkpoints.

    Two stay, because a kill can spoil the newest.

    Raises:
        DiskError: the disk fails, or the folder is gone.
    """
    found = checkpoints(run_dir)
    sync(run_dir)
    for path in found[keep:]:
        disk.remove(path)


def sync(run_dir: Path) -> None:
    """Bring the newest checkpoint, and every file that tells what was measured, to disk.

    The runner syncs nothing, its meta data and flags neither.

    Raises:
        DiskError: the disk fails, or the folder is gone.
    """
    for name in sorted(seal.present(run_dir)):
        disk.sync_file(run_dir / name)
    disk.sync_folder(run_dir)
    # Last: a checkpoint that is whole is gone on from, and then the others are needed.
    for path in checkpoints(run_dir)[:1]:
        disk.sync_file(path)
    disk.sync_folder(run_dir)


def write_json(path: Path, value: Any) -> None:
    """Write and rename, so that a kill or a power cut leaves the old file or the new one."""
    disk.write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_launches(run_dir: Path) -> list[dict[str, Any]]:
    """The launches recorded so far."""
    value = _read_json(run_dir / LAUNCHES)
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []


def launcher() -> dict[str, Any]:
    """Who launches, for the record: machine, its boot, process, and Slurm's job if there is one."""
    return {
        "host": socket.gethostname(),
        "boot": run_lock.boot_id(),
        "pid": os.getpid(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def how_it_ended(launch: dict[str, Any]) -> str | None:
    """What a launch says of its end: "finished ...", "stopped ...", "failed ..."; None if nothing.

    Versions that did not say wrote the exit code.
    """
    how, code = launch.get("how"), launch.get("exit_code")
    if how is None and code is not None:
        return "finished" if code == 0 else f"failed: exit code {code}"
    return how


def seen_to_finish(run_dir: Path) -> bool:
    """Whether the last launch was seen to end well, and nobody is at work there now."""
    launches = read_launches(run_dir)
    how = how_it_ended(launches[-1]) if launches else None
    return how is not None and how.startswith("finished") and not run_lock.held(run_dir)


def close_launches(launches: list[dict[str, Any]], finished: bool = False) -> list[dict[str, Any]]:
    """Say of each launch how it ended; to be asked by who holds the run's lock.

    ``finished``: the last checkpoint is of a run that is over, whatever became of its launcher.

    One that could not write its end was killed (``kill -9``, the OOM killer, a power cut): what is
    certain is that it is over, because the lock was free.
    """
    closed = [
        {**launch, "how": how_it_ended(launch) or _how_it_was_killed(launch)} for launch in launches
    ]
    if finished and closed and not closed[-1]["how"].startswith("finished"):
        closed[-1] = {**closed[-1], "how": f"finished ({closed[-1]['how']})"}
    return closed


def _how_it_was_killed(launch: dict[str, Any]) -> str:
    if launch.get("host") != socket.gethostname():
        return f"launcher killed, or its machine ({launch.get('host', 'unknown')}) stopped"
    return "the machine stopped" if launch.get("boot") != run_lock.boot_id() else "launcher killed"


def _check_intact(run_dir: Path) -> None:
    """See that a run that is over is what it was when its runner was seen to end."""
    record = _read_json(run_dir / seal.NAME)
    if record is None and not (run_dir / seal.NAME).exists():
        return  # the launcher was killed before it could write one, or is an older version
    problems = ["seal.json: cannot be read"]
    if isinstance(record, dict):
        problems = seal.problems(run_dir, record, ended=True)
    if problems:
        raise UserError(
            f"{run_dir}: finished before, and damaged since: {'; '.join(problems)}; put back a "
            "copy, or remove the folder to run it again"
        )


def _same_hparams(run: RunSpec) -> None:
    path = run.run_dir / HPARAMS
    there = _read_json(path)
    if there is None:
        return
    here = json.loads(json.dumps(run.hparams))
    for key in [*here, *(key for key in there if key not in here)]:
        if key not in there or key not in here or there[key] != here[key]:
            raise UserError(
                f"{path}: {key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} "
                "now, and AlgoPerf would resume with the old point; set OUT= to another folder"
            )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
