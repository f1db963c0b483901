"""Do a run again from what its folder says, and compare: ``make repeat RUN=folder``.

The point, seed, workload, step budget and number of threads are those of the folder's ``run.json``.
On the same kind of machine, with the same packages and sources, the parameters end the same to the
bit; where they do not, what differs is named.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import run_folder, seal, submission_loader
from algoperf_shampoo.harness.spec import EVAL_PERIOD, STOP_AT_TARGET, RunSpec

# Of a session: what may change the last bits of a sum.
_MACHINE = (
    "packages", "python_version", "cpu_model_name", "cpu_capability", "torch_num_threads",
    "gpu_model_name", "cuda_version", "os_platform",
)  # fmt: skip


@dataclass(frozen=True)
class Recorded:
    """A finished or unfinished run of the embedded harness, as its folder has it."""

    folder: Path
    record: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What the run is: variant, workload, seed, point, sources."""
        return dict(self.record["identity"])

    @property
    def session(self) -> dict[str, Any]:
        """What it ran on, the last time it was started."""
        return dict((self.record.get("sessions") or [{}])[-1])


def read(folder: Path) -> Recorded:
    """The run in a folder.

    Raises:
        UserError: there is none, or not one that can be done again.
    """
    if not folder.is_dir():
        raise UserError(f"RUN={folder}: no such folder")
    if (folder / "launches.json").is_file():
        raise UserError(
            f"RUN={folder}: a run of AlgoPerf's harness: launches.json has its command, to be "
            "given again with another OUT=; its last bits differ from run to run"
        )
    record = run_folder.read_record(folder)
    if record is None:
        below = sorted(path.parent for path in folder.rglob("run.json"))
        hint = f"; RUN={below[0]} is one" if below else ""
        raise UserError(f"RUN={folder}: no run.json in it{hint}")
    identity = record["identity"]
    needed = ("variant", "label", "workload", "seed", "trial", "hparams", "workload_properties")
    missing = [name for name in needed if not isinstance(identity, dict) or name not in identity]
    if missing:
        raise UserError(f"{folder / 'run.json'}: no identity.{missing[0]}: cannot be repeated")
    _check(folder / "run.json", record)
    return Recorded(folder, record)


def _check(path: Path, record: dict[str, Any]) -> None:
    """See that a record is as it was written, and of a kind that can be done again.

    Raises:
        UserError: its own digest differs, or a value is none that the harness writes.
    """
    if (seal.FILES in record or seal.RECORD in record) and not seal.is_whole(record):
        raise UserError(
            f"{path}: the record has been changed since it was written: its own digest differs; "
            "put back a copy"
        )
    identity = record["identity"]
    limit = identity["workload_properties"]
    limit = limit.get("max_steps") if isinstance(limit, dict) else None
    result, sessions = record.get("result"), record.get("sessions")
    for key, fits in {
        **{f"identity.{key}": _is_name(identity[key]) for key in ("variant", "label", "workload")},
        **{f"identity.{key}": _is_count(identity[key]) for key in ("seed", "trial")},
        "identity.hparams": isinstance(identity["hparams"], dict),
        "identity.workload_properties": isinstance(identity["workload_properties"], dict),
        "identity.workload_properties.max_steps": limit is None or _is_count(limit),
        "identity.stop_at_target": isinstance(identity.get(STOP_AT_TARGET, True), bool),
        "identity.eval_period_steps": _is_period(identity.get(EVAL_PERIOD)),
        "sessions": sessions is None
        or (isinstance(sessions, list) and all(isinstance(one, dict) for one in sessions)),
        "result": result is None or isinstance(result, dict),
    }.items():
        if not fits:
            value = record
            for name in key.split("."):
                value = value.get(name)  # type: ignore[assignment]
            raise UserError(f"{path}: {key} is {_short(value)}: cannot be repeated")


def _is_name(value: Any) -> bool:
    """Whether a value is the name of one folder, so that a path made with it stays in its place."""
    return (
        isinstance(value, str)
        and value not in ("", ".", "..")
        and value.isprintable()
        and not set(value) & set("/\\")
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_period(value: Any) -> bool:
    return value is None or (_is_count(value) and value > 0)


def new_folder(root: Path) -> Path:
    """``results/repeats/N`` with the first number that is free."""
    base = root / "results" / "repeats"
    number = 1
    while (base / str(number)).exists():
        number += 1
    return base / str(number)


def execute(
    run: Recorded,
    out: Path,
    root: Path,
    data_dir: Path | None = None,
    load_workload: Callable[[str], Any] | None = None,
    echo: Callable[[str], None] = print,
) -> Recorded:
    """Train the run again below ``out``.

    Raises:
        UserError: the variant or workload is gone, or the data folder is needed.
    """
    # Imported here: torch takes seconds, and a folder without a run is answered at once.
    import torch

    from algoperf_shampoo import workloads
    from algoperf_shampoo.harness import runner

    identity = run.identity
    submission = submission_loader.load(root, identity["variant"])
    if identity.get("data_dir") and data_dir is None:
        raise UserError(f"DATA_DIR= is needed: the run had {identity['data_dir']}")
    workload = (load_workload or workloads.load)(identity["workload"])
    workload.max_steps = identity["workload_properties"].get("max_steps", workload.max_steps)
    threads = run.session.get("torch_num_threads")
    if isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)
    name = f"{identity['workload']}_pytorch"
    place = out / identity["label"] / f"study_{identity['seed']}" / name
    spec = RunSpec(
        variant=identity["variant"],
        label=identity["label"],
        workload=identity["workload"],
        seed=identity["seed"],
        trial=identity["trial"],
        hparams=identity["hparams"],
        run_dir=place / f"trial_{identity['trial']}",
        stop_at_target=identity.get(STOP_AT_TARGET, True),
        eval_period=identity.get(EVAL_PERIOD),
    )
    _check_place(run, spec.run_dir)
    record = runner.execute(spec, workload, submission, root, data_dir=data_dir, echo=echo)
    return Recorded(spec.run_dir, json.loads(json.dumps(record)))


def _check_place(run: Recorded, run_dir: Path) -> None:
    """See that something will be trained.

    Raises:
        UserError: the folder is the run's own, or holds one that is over.
    """
    if run_dir.resolve() == run.folder.resolve():
        raise UserError(f"OUT=: {run_dir} is the run itself; name another folder, or leave OUT out")
    there = run_folder.read_record(run_dir)
    if there is not None and there.get("status") in run_folder.ENDED:
        raise UserError(
            f"OUT=: {run_dir} holds a run that is over: nothing would be trained; name another "
            "folder, or leave OUT out"
        )


def differences(old: Recorded, new: Recorded) -> list[str]:
    """What is not the same for the two: sources, settings of the workload, machine, packages."""
    lines = _different("", old.identity, new.identity)
    for name in _MACHINE:
        lines += _different(name, old.session.get(name), new.session.get(name))
    commits = [run.session.get("git_commit_hash") for run in (old, new)]
    if any(line.startswith("source_sha256") for line in lines) and commits[0] is not None:
        dirty = ", with changes that were not committed" if old.session.get("git_dirty") else ""
        lines.append(f"its sources: git checkout {commits[0]}{dirty}")
    return lines


def compare(old: Recorded, new: Recorded) -> tuple[bool, list[str]]:
    """Whether the repetition ended the same, and lines that say so or where they part."""
    hashes = [(run.record.get("result") or {}).get("params_sha256") for run in (old, new)]
    losses = [_losses(run.folder / "step_losses.csv") for run in (old, new)]
    common = sorted(losses[0].keys() & losses[1].keys())
    parted = next((step for step in common if losses[0][step] != losses[1][step]), None)
    curve = (
        f"losses: the same at all {len(common)} steps that both have"
        if parted is None
        else f"losses: apart from step {parted} on, {losses[0][parted]} and {losses[1][parted]}"
    )
    if hashes[0] is None:
        state = old.record.get("status")
        words = f"parameters: nothing to compare with: the run is {state}, not finished"
        return parted is None, [words, curve]
    if hashes[0] == hashes[1]:
        return True, [f"parameters: the same hash, {hashes[0]}", curve]
    return False, [f"parameters: {hashes[0]} there,", f"            {hashes[1]} here", curve]


def report(old: Recorded, new: Recorded, root: Path) -> tuple[bool, list[str]]:
    """Whether the run could be repeated, and everything to print."""
    same, lines = compare(old, new)
    differs = differences(old, new)
    lines = [f"repeated in {paths.shown(new.folder, root)}", *lines]
    if differs:
        lines += ["what differs, there and here:", *(f"  {line}" for line in differs)]
    elif not same:
        lines.append("what differs: nothing that the records hold")
    return same, lines


def _different(name: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in dict.fromkeys([*old, *new]):
            where = f"{name}.{key}" if name else str(key)
            lines += _different(where, old.get(key), new.get(key))
        return lines
    return [] if old == new else [f"{name}: {_short(old)}, {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:12] + "..."


def _losses(path: Path) -> dict[int, str]:
    """Step to loss, as it is written; steps that are no number are left out."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(row.get("global_step"), row.get("loss")) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    return {
        int(step): loss
        for step, loss in rows
        if step and loss and step.isascii() and step.isdecimal() and len(step) < 12
    }
