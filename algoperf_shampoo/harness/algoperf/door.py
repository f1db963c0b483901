"""``make submit-<variant> HARNESS=algoperf``: one process group of AlgoPerf's runner per run.

The runner is started with ``--resume_last_run`` always: in a new folder it starts from scratch, in
one with a checkpoint it goes on; neither its question on the terminal nor ``--overwrite``, which
deletes, can come up. Every seed has its own ``--rng_seed`` and study folder, every point of the
search space its own process, because AlgoPerf's OGBG leaks threads until it dies.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo import interrupt, json_input, versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import (
    disk,
    gpus,
    run_lock,
    seal,
    standalone,
    submission_loader,
    tracking,
)
from algoperf_shampoo.harness.algoperf import (
    console,
    data_check,
    env,
    folder,
    minidata,
    processes,
    tables,
)
from algoperf_shampoo.harness.algoperf.command import (
    Command,
    Options,
    compose,
    entry_name,
    step_limit,
)
from algoperf_shampoo.harness.algoperf.place import Place, choose_place, visible_gpus
from algoperf_shampoo.harness.spec import Plan, RunSpec, Standing, no_standing

Fingerprint = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class _Job:
    """A run to start: its step limit, what its folder held, and which checkpoints were seen.

    ``track``: write its record for wandb when it has ended.
    """

    run: RunSpec
    limit: int | None
    state: folder.State
    seen: Fingerprint
    command: Command
    track: bool = False


def launch(
    plan: Plan,
    flags: dict[str, Any],
    echo: Callable[[str], None] = print,
    hit_line: console.HitLine = console.no_hit_line,
    standing: Standing = no_standing,
) -> int:
    """Check everything, then train the runs one after another; the number that failed.

    With ``plan.dry_run`` the commands are printed instead; what is missing is then a note.
    ``hit_line`` reads the log of a run under way for the line on its hit, ``standing`` for one on
    where it stands.

    Raises:
        UserError: something is missing or wrong; no run has been started then.
    """
    options = Options.of(flags)
    seen = {run.run_dir: folder.fingerprint(run.run_dir) for run in plan.runs}
    found = [run_dir / name for run_dir, files in seen.items() for name, *_ in files]
    environment = env.look(plan.root, found)
    with ExitStack() as claims:
        return _launch(plan, options, seen, environment, claims, echo, hit_line, standing)


def _launch(
    plan: Plan,
    options: Options,
    seen: dict[Path, Fingerprint],
    environment: env.Environment,
    claims: ExitStack,
    echo: Callable[[str], None],
    hit_line: console.HitLine,
    standing: Standing,
) -> int:
    place = choose_place(plan, options.processes, environment, echo)
    if place.visible is not None and not plan.dry_run:
        candidates = gpus.named(visible_gpus(environment))
        held = claims.enter_context(gpus.claim(candidates, plan.gpus))
        place = Place(len(held), ",".join(gpu.name for gpu in held))
    missing = env.missing_message(environment)
    if missing is None and options.wandb and not environment.wandb:
        missing = f"WANDB=1: {environment.executable}: no wandb: install it there"
    complain = _fail if not plan.dry_run else (lambda message: echo(f"note: {message}"))
    if missing:
        complain(missing)
    if plan.data_dir is None:
        complain("DATA_DIR= is needed: AlgoPerf's data; `make data-algoperf-mini` makes some")
    data: dict[str, Path] = {}
    for workload in dict.fromkeys(run.workload for run in plan.runs):
        try:
            data[workload] = find_data(plan, workload, environment, check=not missing)
        except UserError as error:
            complain(str(error))
            # A dry run shows the command all the same: data may be mounted elsewhere only.
            if not workload.endswith(minidata.SUFFIX):
                data[workload] = data_check.usual(workload, plan.data_dir or Path("DATA_DIR"))
    jobs = []
    for run in plan.runs:
        if run.workload not in data:
            continue
        limit = step_limit(run, data[run.workload], options)
        state = folder.examine(run, environment.checkpoints, limit)
        _check_batch_sizes(plan, run, data[run.workload], place.processes)
        command = compose(plan, run, data[run.workload], place, environment, options)
        track = options.wandb and tracking.is_offline()
        jobs.append(_Job(run, limit, state, seen[run.run_dir], command, track))
    if plan.dry_run:
        for job in jobs:
            place_of = "built in" if job.run.ruleset == "self" else folder.SEARCH_SPACE
            path = job.run.run_dir / place_of
            echo(f"# {path}: {json.dumps(_points(plan, job.run))}")
            echo(job.command.shown(plan.root))
        return 0
    if place.visible is None and plan.size == "full":
        echo("note: no GPU here; full-size models on a CPU are for trying things out")
    failed = []
    for job in jobs:
        try:
            ended_well = _train(plan, job, environment, echo, hit_line, standing)
        except UserError as error:
            echo(f"error: {job.run.name}: {error}")
            ended_well = False
        if not ended_well:
            failed.append(job.run.name)
    if failed:
        echo(f"{len(failed)} of {len(plan.runs)} runs failed: {', '.join(failed)}")
    return len(failed)


def find_data(plan: Plan, workload: str, environment: env.Environment, check: bool) -> Path:
    """The folder of a workload's data, checked in AlgoPerf's own Python.

    Raises:
        UserError: it is not there, or not as it should be.
    """
    if plan.data_dir is None:
        raise UserError("no DATA_DIR")
    base = minidata.base_name(workload)
    place = data_check.locate(base, plan.data_dir)
    arguments = [base, str(place)]
    if workload.endswith(minidata.SUFFIX):
        arguments.append(json.dumps(minidata.read(place, workload).on_disk))
    if base == "imagenet_vit":
        data_check.locate_imagenet_v2(place)
    if check:
        done = subprocess.run(
            [environment.executable, "-m", data_check.__name__, *arguments],
            cwd=plan.root,
            env={**os.environ, "PYTHONPATH": env.python_path(plan.root)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["the data check failed"])[-1]
            raise UserError(f"DATA_DIR={plan.data_dir}: {last.removeprefix('error: ')}")
    return place


def _write_entry(plan: Plan, run: RunSpec) -> None:
    """The submission of a run under the self-tuning ruleset, as an export of it would be."""
    standalone.write(
        run.run_dir / folder.ENTRY / entry_name(run),
        standalone.entry(plan.root, run.variant, run.hparams),
    )


def _track(plan: Plan, run: RunSpec, python: str, echo: Callable[[str], None]) -> None:
    """Write the run's record for wandb, in AlgoPerf's Python, which has it."""
    done = subprocess.run(
        [python, "-m", tracking.__name__, str(run.run_dir), run.name, run.label],
        cwd=plan.root,
        env={**os.environ, "PYTHONPATH": env.python_path(plan.root)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        words = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        echo(f"{run.name}: note: no wandb record: {words}")


def _check_batch_sizes(plan: Plan, run: RunSpec, data: Path, processes: int) -> None:
    if run.workload.endswith(minidata.SUFFIX):
        entry = minidata.read(data, run.workload)
        sizes = entry.global_batch_size, int(entry.properties["eval_batch_size"])
    else:
        own = submission_loader.batch_size(plan.root, run.variant, run.workload)
        sizes = own, _eval_batch_size(plan, run.workload)
    for name, size in zip(("batch size", "evaluation batch size"), sizes, strict=True):
        if size % processes:
            raise UserError(
                f"GPUS={processes}: {run.workload}: the global {name}, {size}, is not a multiple"
            )


def _eval_batch_size(plan: Plan, workload: str) -> int:
    """AlgoPerf's, as the workload's file has it; the workload itself would import torch."""
    path = (plan.config_dir or versions.CONFIG_DIR) / f"{workload}.json"
    size = json_input.read(path, "workload file").get("full", {}).get("eval_batch_size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path}: full.eval_batch_size is {size!r}; it must be a whole number")
    return size


def _train(
    plan: Plan,
    job: _Job,
    environment: env.Environment,
    echo: Callable[[str], None],
    hit_line: console.HitLine = console.no_hit_line,
    standing: Standing = no_standing,
) -> bool:
    run, state, command = job.run, job.state, job.command
    if state.ended and folder.seen_to_finish(run.run_dir):
        return _complete(run, state, echo)
    with run_lock.hold(run.run_dir, echo=echo) as lock:
        if folder.fingerprint(run.run_dir) != job.seen:
            # Somebody wrote here until now: a launch that has ended, or what one left behind.
            facts = env.look(plan.root, folder.checkpoints(run.run_dir)).checkpoints
            state = folder.examine(run, facts, job.limit)
        if state.ended:
            # Its launcher did not see its end: what it wrote last may be torn, or not on disk.
            for note in tables.bring_to(run.run_dir, state.checkpoint):
                echo(f"{run.name}: {note}")
            launches = folder.close_launches(folder.read_launches(run.run_dir), finished=True)
            folder.sync(run.run_dir)
            folder.write_json(run.run_dir / folder.LAUNCHES, launches)
            if launches:
                _seal(run.run_dir, launches[-1])
            return _complete(run, state, echo)
        for note in folder.prepare(run, state, _points(plan, run)):
            echo(f"{run.name}: {note}")
        if run.ruleset == "self":
            _write_entry(plan, run)
        if state.step:
            echo(f"{run.name}: going on from step {state.step}; AlgoPerf's data starts over")
        record = {
            "arguments": command.arguments,
            "environment": command.environment,
            "from_step": state.step,
            "started": _now(),
            **folder.launcher(),
            "python": environment.python,
            "torch": environment.torch,
            "cuda": environment.cuda,
            "gpus": environment.gpus,
            "algoperf": environment.algoperf,
            "algoperf_commit": environment.algoperf_commit,
            "ended": None,
            "exit_code": None,
            "how": None,
            "left_behind": [],
        }
        launches = [*folder.close_launches(folder.read_launches(run.run_dir)), record]
        folder.write_json(run.run_dir / folder.LAUNCHES, launches)
        disk.remove(run.run_dir / seal.NAME)  # what it sealed is about to change
        try:
            ending = console.run(
                plan.root, run.run_dir, run.name, command, lock, echo, hit_line, standing
            )
            record |= asdict(ending)
        except BaseException as error:
            record["how"] = _how(error)
            raise
        finally:
            record["ended"] = _now()
            folder.sync(run.run_dir)  # before it is said to have finished
            folder.write_json(run.run_dir / folder.LAUNCHES, launches)
            _seal(run.run_dir, record)
    if job.track and ending.exit_code == 0:
        _track(plan, run, environment.executable, echo)
    if ending.left_behind:
        echo(f"{run.name}: left behind by the runner, and ended: {', '.join(ending.left_behind)}")
    if ending.exit_code:
        echo(f"{run.name}: {ending.how}; see {run.run_dir / folder.CONSOLE}")
    return ending.exit_code == 0


def _complete(run: RunSpec, state: folder.State, echo: Callable[[str], None]) -> bool:
    echo(f"{run.name}: complete already ({state.ended}, step {state.step})")
    return True


def _seal(run_dir: Path, launch: dict[str, Any]) -> None:
    """Write down what the folder holds now that the runner has ended."""
    with disk.explained(run_dir):
        files = seal.make(run_dir)
    record = {
        "format": 1,
        "ended": launch.get("ended"),
        "exit_code": launch.get("exit_code"),
        seal.FILES: files,
    }
    folder.write_json(run_dir / seal.NAME, seal.signed(record))


def _how(error: BaseException) -> str:
    if isinstance(error, interrupt.Interrupted):
        return f"stopped by {processes.signal_name(error.signal_number)}"
    return f"launcher failed: {type(error).__name__}: {error}"


def _points(plan: Plan, run: RunSpec) -> list[dict[str, Any]]:
    """The search space as the runner reads it: the points of this study up to this trial."""
    study = run.run_dir.parent
    return [r.hparams for r in plan.runs if r.run_dir.parent == study and r.trial <= run.trial]


def _fail(message: str) -> None:
    raise UserError(message)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
