"""Run a declared study of claims and say what it gave: ``python scripts/claims.py --quick``."""

from __future__ import annotations

import functools
from pathlib import Path

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import interrupt
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk
from algoperf_shampoo.study import busy, local, plan, progress, status, study
from algoperf_shampoo.study import figures as runs_figures
from algoperf_shampoo.study.claims import figures, file, results, rule

_CLAIMS = flags.DEFINE_string("claims", "claims", "A study of claims: its name, or a file.json.")
_QUICK = flags.DEFINE_bool("quick", False, "Few seeds and steps, no verdicts: does it run?")
_OUT = flags.DEFINE_string("out", None, "Folder for the runs; results/runs/mini if left out.")
_JOBS = flags.DEFINE_string("jobs", None, "Runs at once; as many as there are cores, or GPUs.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Show the claims and the cost, run nothing.")


def main() -> int:
    """Show the claims, run what is missing, weigh; 1 if a run failed."""
    quick = _QUICK.value
    path = study.find(_CLAIMS.value)
    declared = file.read(path)
    seeds = declared.quick_seeds if quick else declared.seeds
    steps = str(declared.quick_steps) if quick else None
    wanted = study.lay_out(
        ROOT,
        _CLAIMS.value,
        study.Options(seeds=",".join(map(str, seeds)) + ",", steps=steps, out=_OUT.value),
    )
    print(f"{wanted.name}: {declared.title}", *results.designs(declared, seeds), sep="\n")
    live, hopeless = rule.decidable(declared.claims, len(plan.WORKLOADS) * len(seeds))
    if hopeless and not quick:
        raise UserError(
            f"{path}: mini.seeds: {len(seeds)} seeds a mini decide none of {len(hopeless)} claims: "
            "nothing is run; more seeds, or QUICK=1, which decides nothing"
        )
    found = status.look([job.run for job in wanted.jobs])
    looked = {spec.run_dir: now for spec, now in found}
    missing = [
        job
        for job in wanted.jobs
        if not (now := looked[job.run.run_dir]).over and now.state != progress.RUNNING
    ]
    spoiled = status.unlaunchable(found)
    print(*spoiled, sep="\n", end="\n" if spoiled else "")
    before = results.outcome(declared, wanted, quick)
    print(f"\n{len(missing)} of {len(wanted.jobs)} runs to launch")
    if missing:
        print(*results.costs(missing, declared, before.runs, steps, ROOT), sep="\n", flush=True)
    if _DRY_RUN.value:
        print(*(job.command for job in missing), sep="\n")
        return 0
    failed = 0
    if missing:
        with interrupt.unwinding(lambda: "the runs under way are ended; make claims again goes on"):
            failed = local.run(wanted, missing, _jobs(), functools.partial(print, flush=True))
    after = results.outcome(declared, wanted, quick)
    print("", *results.text(after), sep="\n")
    stem = ROOT / "results" / ("claims_quick" if quick else "claims")
    for ending, content in (
        ("md", results.markdown(after, ROOT)),
        ("json", results.to_json(after, ROOT)),
    ):
        disk.write_atomically(Path(f"{stem}.{ending}"), content.encode())
    written = [f"results/{stem.name}.md", f"results/{stem.name}.json", *_figures(after)]
    print(f"\nwritten: {', '.join(written)}")
    return 1 if failed or spoiled else 0


def _figures(found: results.Outcome) -> list[str]:
    """Draw them beside the page, where there is matplotlib; what was written."""
    try:
        drawn = figures.draw(found)
    except ModuleNotFoundError:
        print("note: no figures: no matplotlib in this Python: pip install -e '.[figures]'")
        return []
    paths = runs_figures.write(drawn, ROOT / "results" / "figures")
    return [path.relative_to(ROOT).as_posix() for path in paths]


def _jobs() -> int:
    if _JOBS.value is None:
        return busy.cores()
    if not (_JOBS.value.isascii() and _JOBS.value.isdecimal()) or int(_JOBS.value) < 1:
        raise UserError(f"JOBS={_JOBS.value}: an integer of at least 1")
    return int(_JOBS.value)


if __name__ == "__main__":
    run(main)
