"""Run declared studies of claims and say what they gave: ``python scripts/claims.py --quick``."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import factor_log, interrupt
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk, gpus
from algoperf_shampoo.study import busy, forks, local, plan, progress, status
from algoperf_shampoo.study import figures as runs_figures
from algoperf_shampoo.study.claims import committed, costs, figures, results, rule, tuning
from algoperf_shampoo.study.study import Job

_CLAIMS = flags.DEFINE_list("claims", "claims", "Studies of claims: names, or files.json.")
_QUICK = flags.DEFINE_bool("quick", False, "Few seeds and steps, no verdicts: does it run?")
_OUT = flags.DEFINE_string("out", None, "Folder for the runs; results/runs/mini if left out.")
_JOBS = flags.DEFINE_string("jobs", None, "Runs at once; as many as there are cores, or GPUs.")
_WALL = flags.DEFINE_string("wall", None, "Seconds after which runs under way are ended.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show the claims and the cost, run nothing.")


def main() -> int:
    """Show the claims, run what is missing, weigh; 1 if a run failed."""
    found = [_laid_out(name) for name in _CLAIMS.value]
    missing, spoiled = _missing(found)
    known = {job.run.run_dir for phases in found for job in phases.jobs}
    print(f"\n{len(missing)} of {len(known)} runs to launch")
    if missing:
        later = [job for phases in found for job in phases.foreseen()]
        if later:
            print(f"{len(later)} more follow, once learning rates are chosen")
        print(*costs.lines([*missing, *later], _at_once(), ROOT), sep="\n", flush=True)
    if _DRY_RUN.value:
        print(*(job.command for job in missing), sep="\n")
        return 0
    failed = _launch(found, missing) if missing else 0
    for phases in found:
        _weigh(phases)
    return 1 if failed or spoiled else 0


def _laid_out(name: str) -> tuning.Phases:
    """A study of claims; its claims are printed, and refused where they cannot be decided."""
    phases = tuning.lay_out(ROOT, name, _OUT.value, _QUICK.value)
    declared = phases.declared
    seeds = declared.quick_seeds if phases.quick else declared.seeds
    print(f"{phases.path.stem}: {declared.title}", *results.designs(declared, seeds), sep="\n")
    if declared.rates:
        shown = ", ".join(map(str, declared.tuning_seeds))
        size = len(next(iter(declared.rates.values())))
        print(f"  tuned on seeds {shown}: {len(declared.rates)} arms, {size} rates on each mini")
    _, hopeless = rule.decidable(declared.claims, len(plan.WORKLOADS) * len(seeds))
    if hopeless and not phases.quick:
        raise UserError(
            f"{phases.path}: mini.seeds: {len(seeds)} seeds a mini decide none of {len(hopeless)} "
            "claims: nothing is run; more seeds, or QUICK=1, which decides nothing"
        )
    return phases


def _missing(found: Sequence[tuning.Phases]) -> tuple[list[Job], list[str]]:
    """Runs that are to be launched now, each once: what is reported first, then what tunes it; and
    a line for each run that cannot be."""
    missing: dict[Path, Job] = {}
    spoiled: list[str] = []
    tuned = [phases.tuning.jobs for phases in found if phases.tuning is not None]
    for jobs in [*(phases.study.jobs for phases in found), *tuned]:
        looked = status.look([job.run for job in jobs])
        spoiled += status.unlaunchable(looked)
        left = [
            job
            for job, (_, now) in zip(jobs, looked, strict=True)
            if not now.over and now.state != progress.RUNNING
        ]
        for job in costs.longest_first(left, ROOT):
            missing.setdefault(job.run.run_dir, job)
    print(*spoiled, sep="\n", end="\n" if spoiled else "")
    return list(missing.values()), spoiled


def _launch(found: Sequence[tuning.Phases], missing: Sequence[Job]) -> int:
    """Run them, and what can be run once they are done; how many failed."""

    def more(ended: Job) -> list[Job]:
        return costs.longest_first([j for phases in found for j in phases.after(ended)], ROOT)

    # No claim is about single factors, whose files are most of a run's bytes.
    os.environ.setdefault(factor_log.VARIABLE, "off")
    server = None if gpus.here() else forks.Forks(ROOT)
    try:
        with interrupt.unwinding(lambda: "the runs under way are ended; make claims again goes on"):
            return local.run(
                found[0].study,
                missing,
                _at_once(),
                functools.partial(print, flush=True),
                more=more,
                seconds=_number("WALL", _WALL.value),
                forks=server,
            )
    finally:
        if server is not None:
            server.close()


def _weigh(phases: tuning.Phases) -> None:
    """Print what the runs of a study say, and write it down."""
    after = results.outcome(phases.declared, phases.study, phases.quick, phases.choices)
    print("", *results.text(after), sep="\n")
    own = "claims" if phases.path.stem == "claims" else f"claims_{phases.path.stem}"
    name = own + ("_quick" if phases.quick else "")
    for path, content in committed.files(after, ROOT, ROOT / "results" / name).items():
        disk.write_atomically(path, content.encode())
    written = [f"results/{name}.md", f"results/{name}.json", *_figures(after, own)]
    print(f"\nwritten: {', '.join(written)}")


def _figures(found: results.Outcome, name: str) -> list[str]:
    """Draw them beside the page, where there is matplotlib; what was written."""
    try:
        drawn = figures.draw(found, name)
    except ModuleNotFoundError:
        print("note: no figures: no matplotlib in this Python: pip install -e '.[figures]'")
        return []
    paths = runs_figures.write(drawn, ROOT / "results" / "figures")
    return [path.relative_to(ROOT).as_posix() for path in paths]


def _at_once() -> int:
    return _number("JOBS", _JOBS.value) or busy.cores()


def _number(word: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not (value.isascii() and value.isdecimal() and len(value) < 10) or int(value) < 1:
        raise UserError(f"{word}={value}: an integer of at least 1")
    return int(value)


if __name__ == "__main__":
    run(main)
