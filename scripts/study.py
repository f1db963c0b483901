"""Plan, launch and resume a study: ``python scripts/study.py --study=table3 --size=mini``."""

from __future__ import annotations

import functools
import shlex

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import interrupt, versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import cost, local, logs, progress, slurm, status, study

_LAUNCHERS = ("local", "slurm", "print")

_STUDY = flags.DEFINE_string("study", "mini", f"{', '.join(study.names())}, or a file.json.")
_SIZE = flags.DEFINE_string("size", "mini", "mini (small models, data shipped) or full.")
_HARNESS = flags.DEFINE_string("harness", None, "embedded (default for mini) or algoperf.")
_WORKLOAD = flags.DEFINE_string("workload", "all", "One workload's rows alone.")
_SEEDS = flags.DEFINE_string("seeds", None, "A count or a list, instead of the study's own.")
_GPUS = flags.DEFINE_string("gpus", None, "GPUs a run, instead of the study's own.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Data folder, as the runs' machine has it.")
_OUT = flags.DEFINE_string("out", None, "Folder for the runs; results/runs/SIZE if left out.")
_STEPS = flags.DEFINE_string("steps", None, "End each run after so many steps.")
_PROCESSES = flags.DEFINE_string("processes", None, "HARNESS=algoperf without a GPU: processes.")
_WANDB = flags.DEFINE_bool("wandb", False, "HARNESS=algoperf: log to Weights & Biases as well.")
_LAUNCHER = flags.DEFINE_enum("launcher", "local", _LAUNCHERS, "Where to: here, Slurm, nowhere.")
_JOBS = flags.DEFINE_string("jobs", None, "Runs at once here; as many as GPUs, one on a CPU.")
_PARTITION = flags.DEFINE_string("partition", None, "Slurm's partition.")
_ACCOUNT = flags.DEFINE_string("account", None, "Slurm's account.")
_QOS = flags.DEFINE_string("qos", None, "Slurm's quality of service.")
_TIME = flags.DEFINE_string("time", None, "Slurm's time limit of a run; it goes on after it.")
_MEM = flags.DEFINE_string("mem", None, "Memory of a run, as sbatch takes it.")
_CPUS = flags.DEFINE_string("cpus", None, "Cores of a run; 8 a GPU, one without.")
_LIMIT = flags.DEFINE_string("limit", None, "Runs of an array at once.")
_SBATCH = flags.DEFINE_string("sbatch", None, "Further flags of sbatch.")
_CONTAINER = flags.DEFINE_string("container", None, "pyxis, apptainer or docker.")
_IMAGE = flags.DEFINE_string("image", None, "The container's image.")
_PRICE = flags.DEFINE_string("price", None, "Of an hour of one GPU, for the preview of costs.")
_VERSION = flags.DEFINE_string("version", None, "AlgoPerf's: v0.5, v0.6 or 2026.")
_RULESET = flags.DEFINE_string("ruleset", "external", "external, or self: the point built in.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be launched, write nothing.")


def main() -> int:
    """Show the study, and launch what of it is missing; 1 if a run failed."""
    wanted = study.lay_out(ROOT, _STUDY.value, options())
    queue = slurm.queue()
    found = status.look([job.run for job in wanted.jobs], queue)
    print(status.render(f"{wanted.name}: {wanted.title}", found), *wanted.absent, sep="\n")
    looked = {run.run_dir: now for run, now in found}
    settled = (progress.RUNNING, status.QUEUED)
    missing = [
        job
        for job in wanted.jobs
        if not (now := looked[job.run.run_dir]).over and now.state not in settled
    ]
    spoiled = status.unlaunchable(found)
    print(*spoiled, sep="\n", end="\n" if spoiled else "")
    print(f"\n{len(missing)} of {len(wanted.jobs)} runs to launch", flush=True)
    if lines := _costs(wanted, missing):
        print("", *lines, sep="\n", flush=True)
    if _DRY_RUN.value or _LAUNCHER.value == "print":
        print(*(job.command for job in missing), sep="\n")
        if _LAUNCHER.value != "print":
            texts = slurm.scripts(wanted, missing, slurm_options(), largest=1000)
            for name, text in texts.items():
                print(f"\n# --- {name} (LAUNCHER=slurm)\n{text}", end="")
        return 0
    echo = functools.partial(print, flush=True)
    if not missing:
        return 1 if spoiled else 0
    if _LAUNCHER.value == "slurm":
        slurm.submit(wanted, missing, slurm_options(), echo)
        print(f"{_status_command()} shows how they go")
        return 1 if spoiled else 0
    with interrupt.unwinding(lambda: "the runs under way are ended; make study again goes on"):
        failed = local.run(wanted, missing, _count("JOBS", _JOBS.value), echo)
    found = status.look([job.run for job in wanted.jobs], queue)
    print("\n" + status.render(f"{wanted.name}: {wanted.title}", found))
    return 1 if failed or spoiled else 0


def _costs(wanted: study.Study, missing: list[study.Job]) -> list[str]:
    """What is still to be spent: of full runs, or at a price."""
    if not missing:
        return []
    price = None if _PRICE.value is None else cost.parse_price(_PRICE.value)
    if wanted.size != "full" and price is None:
        return []
    own = logs.find_trials([wanted.out]) if wanted.out.is_dir() else []
    gpus = {job.run.workload: job.gpus for job in missing if job.gpus}
    return cost.preview(
        [job.run for job in missing],
        price,
        gpus,
        version=_VERSION.value or versions.DEFAULT,
        ruleset=_RULESET.value,
        records=own,
    )


def options() -> study.Options:
    """The words that reach the runs."""
    return study.Options(
        size=_SIZE.value,
        harness=_HARNESS.value,
        workload=_WORKLOAD.value,
        seeds=_SEEDS.value,
        gpus=_GPUS.value,
        data_dir=_DATA_DIR.value,
        out=_OUT.value,
        steps=_STEPS.value,
        processes=_PROCESSES.value,
        wandb=_WANDB.value,
        version=_VERSION.value,
        ruleset=_RULESET.value,
    )


def slurm_options() -> slurm.Options:
    """The words for Slurm."""
    return slurm.Options(
        partition=_PARTITION.value,
        account=_ACCOUNT.value,
        qos=_QOS.value,
        time=_TIME.value,
        mem=_MEM.value,
        cpus=_CPUS.value,
        limit=_LIMIT.value,
        extra=_SBATCH.value,
        container=_CONTAINER.value,
        image=_IMAGE.value,
    )


def _status_command() -> str:
    words = {"STUDY": _STUDY.value, "SIZE": _SIZE.value, "HARNESS": _HARNESS.value}
    words |= {"WORKLOAD": None if _WORKLOAD.value == "all" else _WORKLOAD.value}
    words |= {"SEEDS": _SEEDS.value, "STEPS": _STEPS.value, "VERSION": _VERSION.value}
    words |= {"RULESET": _RULESET.value if _RULESET.value != "external" else None}
    words |= {"OUT": _OUT.value}
    given = [f"{name}={shlex.quote(value)}" for name, value in words.items() if value]
    return " ".join(["make status", *given])


def _count(word: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal()) or int(value) < 1:
        raise UserError(f"{word}={value}: an integer of at least 1")
    return int(value)


if __name__ == "__main__":
    run(main)
