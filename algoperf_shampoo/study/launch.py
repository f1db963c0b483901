"""Run a plan: check every run first, then train them one after another."""

from __future__ import annotations

import functools
import importlib.util
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from algoperf_shampoo import factor_log, paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import gpus, tracking
from algoperf_shampoo.harness.spec import Plan, RunSpec, Standing
from algoperf_shampoo.study import busy, events, progress, standing

Echo = Callable[[str], None]


def launch(
    plan: Plan,
    flags: dict[str, Any] | None = None,
    load_workload: Callable[[str], Any] | None = None,
    echo: Echo = print,
) -> int:
    """Launch a plan; the number of runs that failed.

    A failing run prints its traceback and the next one starts. ``load_workload`` makes a workload
    from its name; by default the suite's own.

    Raises:
        UserError: something is wrong with the plan; no run has been started then.
    """
    asked = os.environ.get(factor_log.VARIABLE, "")
    if asked not in ("", "off"):
        raise UserError(
            f'{factor_log.VARIABLE}={asked}: here it is "off" or not set: runs have the file'
        )
    if plan.harness == "algoperf":
        return _launch_algoperf(plan, flags or {})
    return _launch_embedded(plan, flags or {}, load_workload, echo)


def _launch_algoperf(plan: Plan, flags: dict[str, Any]) -> int:
    from algoperf_shampoo.harness.algoperf import door

    if flags.get("keep_diverged"):
        raise UserError("KEEP_DIVERGED=1: AlgoPerf's harness ends no diverged run; leave it out")
    told = standing.teller(_against(plan, flags), plan.runs)
    return door.launch(plan, flags, hit_line=progress.hit_line_of, standing=told)


def _against(plan: Plan, flags: dict[str, Any]) -> Path | None:
    """The folder of runs to stand against, if there is to be one."""
    given = flags.get("against")
    return paths.given("AGAINST", given, plan.root) if given else None


def _launch_embedded(
    plan: Plan,
    flags: dict[str, Any],
    load_workload: Callable[[str], Any] | None,
    echo: Echo,
) -> int:
    told = standing.teller(_against(plan, flags), plan.runs)
    with _own_gpu(plan, echo):
        return _train_embedded(plan, flags, load_workload, echo, told)


@contextmanager
def _own_gpu(plan: Plan, echo: Echo) -> Iterator[None]:
    """Hold a GPU that no other run holds, and see it alone; torch has not looked yet."""
    here = [] if plan.dry_run else gpus.here()
    if not here:
        yield
        return
    before = os.environ.get(gpus.VISIBLE)
    with ExitStack() as claims:
        try:
            os.environ[gpus.VISIBLE] = claims.enter_context(gpus.claim(here, 1))[0].name
        except UserError:
            echo(f"note: all {len(here)} GPUs here are held by other runs: sharing the first")
        try:
            yield
        finally:
            if before is None:
                os.environ.pop(gpus.VISIBLE, None)
            else:
                os.environ[gpus.VISIBLE] = before


def _train_embedded(
    plan: Plan,
    flags: dict[str, Any],
    load_workload: Callable[[str], Any] | None,
    echo: Echo,
    told: Standing,
) -> int:
    if plan.dry_run and importlib.util.find_spec("torch") is None:
        echo("note: no torch in this Python: what the folders hold is not compared with the plan")
        return 0
    # Imported here: torch takes seconds, and a plan with a mistake never gets this far.
    import torch

    from algoperf_shampoo.harness import run_folder, runner, submission_loader

    if "OMP_NUM_THREADS" not in os.environ and not torch.cuda.is_available():
        # The minis are too small to share among threads, and one thread's sums do not depend on
        # how many cores a machine has.
        torch.set_num_threads(1)
    if plan.gpus and not torch.cuda.is_available():
        raise UserError(f"GPUS={plan.gpus}: torch finds no GPU here; leave GPUS out to use the CPU")
    load = functools.cache(_shortened(load_workload or _suite_loader(plan), plan.steps))
    submissions = {
        variant: submission_loader.load(plan.root, variant)
        for variant in dict.fromkeys(run.variant for run in plan.runs)
    }
    for run in plan.runs:
        own = runner.identity(run, load(run.workload), plan.root, plan.data_dir)
        run_folder.check(run.run_dir, own)
    if plan.dry_run:
        return 0
    if not torch.cuda.is_available():
        note = busy.note(torch.get_num_threads(), busy.cores(), busy.load())
        if note:
            echo(f"note: {note}")
    failed = 0
    for run in plan.runs:
        try:
            with progress.noting_failure(run.run_dir):
                record = runner.execute(
                    run,
                    load(run.workload),
                    submissions[run.variant],
                    plan.root,
                    data_dir=plan.data_dir,
                    flags=flags,
                    echo=echo,
                    keep_diverged=bool(flags.get("keep_diverged")),
                    standing=told,
                )
            _track(run, record, bool(flags.get("wandb")), echo)
        except UserError as error:
            failed += 1
            echo(_complaint(run.name, str(error)))
        except OSError as error:
            failed += 1
            echo(_complaint(run.name, paths.complaint(error)))
        except Exception:  # whatever a submission does wrong, the next run is to start
            failed += 1
            echo(f"{run.name}: failed:\n{traceback.format_exc()}")
    if failed:
        echo(f"{failed} of {len(plan.runs)} runs failed")
    return failed


def _shortened(load: Callable[[str], Any], steps: int | None) -> Callable[[str], Any]:
    """``load``, the step budget of what it gives cut to ``steps``; the schedule stays."""

    def cut(name: str) -> Any:
        workload = load(name)
        if steps is not None:
            if workload.max_steps is not None and steps > workload.max_steps:
                raise UserError(f"STEPS={steps}: the budget of {name} is {workload.max_steps}")
            workload.max_steps = steps
        return workload

    return cut


def _track(run: RunSpec, record: dict[str, Any], wandb: bool, echo: Echo) -> None:
    """Write the curves of a run that has ended for TensorBoard and, if asked for, for wandb."""
    started = record["sessions"][0]["started_unix_time"]
    try:
        if not events.path(run.run_dir, started).exists() or record["status"] != "finished":
            events.write(run.run_dir, started)
    except UserError as error:  # an earlier run in a folder that can be read only, say
        echo(f"{run.name}: note: no curves for TensorBoard: {error}")
    if wandb:
        try:
            tracking.record(run.run_dir, run.name, run.label)
        except Exception as error:  # whatever a service does wrong, the run is a run
            echo(f"{run.name}: note: no wandb record: {error}")


def _complaint(name: str, text: str) -> str:
    return f"error: {name}: {' '.join(text.split())}"


def _suite_loader(plan: Plan) -> Callable[[str], Any]:
    from algoperf_shampoo import workloads

    def load(name: str) -> Any:
        return workloads.load(name, config_dir=plan.config_dir)

    return load
