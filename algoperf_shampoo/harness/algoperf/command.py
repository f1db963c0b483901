"""The command line of one run under AlgoPerf's runner, and what it is made from."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo import factor_log
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import tracking
from algoperf_shampoo.harness.algoperf import benchmark, data_check, env, folder, minidata
from algoperf_shampoo.harness.algoperf.place import Place
from algoperf_shampoo.harness.spec import Plan, RunSpec

RUNNER = "submission_runner"
OWN_RUNNER = "algoperf_shampoo.harness.algoperf.runner"
WORKER = "algoperf_shampoo.harness.algoperf.worker"


@dataclass(frozen=True)
class Options:
    """What a command line may say besides the plan.

    ``max_steps`` is AlgoPerf's ``--max_global_steps``; ``processes`` a number of processes to start
    where there is no GPU.
    """

    max_steps: int | None = None
    wandb: bool = False
    processes: int | None = None

    @classmethod
    def of(cls, flags: dict[str, Any]) -> Options:
        """From a dict of flags by name; others in it are of no concern here."""
        return cls(
            max_steps=_count("STEPS", flags.get("steps")),
            wandb=bool(flags.get("wandb")),
            processes=_count("PROCESSES", flags.get("processes")),
        )


@dataclass(frozen=True)
class Command:
    """A process to start: program and arguments, and what its environment has besides ours."""

    arguments: tuple[str, ...]
    environment: dict[str, str]

    def shown(self, cwd: Path) -> str:
        """The command as a line for a shell."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([f"cd {shlex.quote(str(cwd))} &&", *settings, shlex.join(self.arguments)])


def step_limit(run: RunSpec, data: Path, options: Options) -> int | None:
    """``--max_global_steps``: STEPS, else a mini data set's own, else none."""
    if options.max_steps is not None or not run.workload.endswith(minidata.SUFFIX):
        return options.max_steps
    return minidata.read(data, run.workload).max_global_steps


def compose(
    plan: Plan,
    run: RunSpec,
    data: Path,
    place: Place,
    environment: env.Environment,
    options: Options,
) -> Command:
    """The process of one run."""
    own = (
        place.visible is None
        or run.workload.endswith(minidata.SUFFIX)
        or not environment.psutil_knows_machine
        or plan.version is not None
    )
    start = [environment.executable]
    if place.processes > 1:
        # What the program `torchrun` of this environment calls.
        start += ["-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
        start += [f"--nproc_per_node={place.processes}"]
    study = run.run_dir.parent.parent
    arguments = {
        "workload": run.workload,
        "framework": "pytorch",
        **_ruleset_flags(run),
        "data_dir": data,
        "experiment_dir": study.parent,
        "experiment_name": study.name,
        "rng_seed": run.seed,
    }
    if minidata.base_name(run.workload) == "imagenet_vit":
        arguments["imagenet_v2_data_dir"] = _imagenet_v2(plan, data)
    limit = step_limit(run, data, options)
    if limit is not None:
        arguments["max_global_steps"] = limit
    flags = [f"--{name}={value}" for name, value in arguments.items()] + ["--resume_last_run"]
    if place.visible is None:
        flags.append("--notorch_compile")
    settings = {"PYTHONPATH": env.python_path(plan.root)}
    if os.environ.get(factor_log.VARIABLE) != "off":
        settings[factor_log.VARIABLE] = str(run.run_dir)
    if run.ruleset == "self":
        settings["PYTHONPATH"] = f"{run.run_dir / folder.ENTRY}:{settings['PYTHONPATH']}"
    if plan.version is not None:
        settings[benchmark.VARIABLE] = plan.version
    if place.visible is not None:
        settings["CUDA_VISIBLE_DEVICES"] = place.visible
    if options.wandb and not tracking.is_offline():
        flags.append("--use_wandb")
        settings |= _wandb_settings(run)
    runner = OWN_RUNNER if own else RUNNER
    return Command((*start, "-m", WORKER, runner, *flags), settings)


def _imagenet_v2(plan: Plan, data: Path) -> Path:
    try:
        return data_check.locate_imagenet_v2(data)
    except UserError:
        if plan.dry_run:  # it has been noted, and may be there on the machine that is meant
            return data
        raise


def _ruleset_flags(run: RunSpec) -> dict[str, Any]:
    """Which submission the runner takes, and which point: a file's, or the one built in."""
    if run.ruleset == "self":
        return {
            "submission_path": f"{entry_name(run)}/submission.py",
            "tuning_ruleset": "self",
        }
    return {
        "submission_path": f"submissions/{run.variant}/submission.py",
        "tuning_ruleset": "external",
        "tuning_search_space": run.run_dir / folder.SEARCH_SPACE,
        "num_tuning_trials": run.trial,
        "hparam_start_index": run.trial - 1,
        "hparam_end_index": run.trial,
    }


def entry_name(run: RunSpec) -> str:
    """Package of the submission with its point built in, found through PYTHONPATH."""
    return f"{run.variant}_self_tuning"


def _wandb_settings(run: RunSpec) -> dict[str, str]:
    """A fixed id per run folder, so that a resumed run goes on in the same record.

    Offline that has no effect: the record is then written when the run has ended (:func:`_track`).
    """
    return {
        "WANDB_RUN_ID": tracking.run_id(run.run_dir),
        "WANDB_RESUME": "allow",
        "WANDB_NAME": run.name.replace(" ", "-"),
        "WANDB_RUN_GROUP": run.label,
    }


def _count(word: str, value: Any) -> int | None:
    if value is None:
        return None
    if not (str(value).isascii() and str(value).isdecimal()) or int(value) < 1:
        raise UserError(f"{word}={value}: an integer of at least 1")
    return int(value)
