"""How the runs of a study, or of a folder, go: ``python scripts/status.py --study=table3``."""

from __future__ import annotations

from pathlib import Path

from absl import flags
from command_line import ROOT, run

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.spec import RunSpec
from algoperf_shampoo.study import logs, plan, slurm, standing, status, study

_STUDY = flags.DEFINE_string("study", None, f"{', '.join(study.names())}, or a file.json.")
_SIZE = flags.DEFINE_string("size", "mini", "mini or full.")
_HARNESS = flags.DEFINE_string("harness", None, "embedded (default for mini) or algoperf.")
_WORKLOAD = flags.DEFINE_string("workload", "all", "One workload's rows alone.")
_SEEDS = flags.DEFINE_string("seeds", None, "A count or a list, instead of the study's own.")
_STEPS = flags.DEFINE_string("steps", None, "The STEPS= that the study was launched with.")
_OUT = flags.DEFINE_string("out", None, "Folder of the runs; results/runs/SIZE if left out.")
_VERSION = flags.DEFINE_string("version", None, "The VERSION= that the study was launched with.")
_AGAINST = flags.DEFINE_string("against", None, "A run, or a folder of runs, to stand against.")
_RULESET = flags.DEFINE_string("ruleset", "external", "The RULESET= of the study, likewise.")
_EVERY = flags.DEFINE_string("every", "2", "Seconds between two looks, on a terminal.")
_ONCE = flags.DEFINE_bool("once", False, "Print the table once, on a terminal too.")


def main() -> int:
    """Print the table; on a terminal, again and again until nothing is under way."""
    every = _seconds(_EVERY.value)
    title, runs = _runs()

    rivals = _rivals(runs)
    if rivals:
        names = ", ".join(dict.fromkeys(rival.name for rival in rivals.values()))
        title += f"; against {names}: steps and time to the same metric value"

    def look() -> list[tuple[RunSpec, status.Progress]]:
        return status.look(runs, slurm.queue(), rivals, compare=_STUDY.value is not None)

    if status.live() and not _ONCE.value:
        status.watch(title, look, every)
    print(status.render(title, look()))
    return 0


def _runs() -> tuple[str, list[RunSpec]]:
    """A study's runs, or else what lies in the folder."""
    if _STUDY.value is not None:
        wanted = study.lay_out(
            ROOT,
            _STUDY.value,
            study.Options(
                size=_SIZE.value,
                harness=_HARNESS.value,
                workload=_WORKLOAD.value,
                seeds=_SEEDS.value,
                steps=_STEPS.value,
                version=_VERSION.value,
                ruleset=_RULESET.value,
                out=_OUT.value,
            ),
        )
        return f"{wanted.name}: {wanted.title}", [job.run for job in wanted.jobs]
    if _SIZE.value not in plan.SIZES:
        raise UserError(f"SIZE={_SIZE.value}: there is {', '.join(plan.SIZES)}")
    out = paths.given("OUT", _OUT.value or f"results/runs/{_SIZE.value}", ROOT)
    if not out.is_dir():
        raise UserError(f"OUT={out}: no such folder of runs; make submit-<variant> makes some")
    folders = sorted(path for path in out.rglob("trial_*") if logs.is_trial(path))
    return str(out), [_spec(path) for path in folders]


def _spec(path: Path) -> RunSpec:
    """A run as far as its folder's name tells it."""
    label, seed = path.parents[2].name, path.parents[1].name.removeprefix("study_")
    return RunSpec(
        variant=label,
        label=label,
        workload=path.parent.name.rpartition("_")[0],
        seed=int(seed) if seed.isdecimal() else 0,
        trial=int(path.name.removeprefix("trial_")),
        hparams={},
        run_dir=path,
    )


def _rivals(runs: list[RunSpec]) -> dict[Path, standing.Rival]:
    """The run that each stands against, by its folder."""
    if _AGAINST.value is None:
        return {}
    return standing.choose_each(paths.given("AGAINST", _AGAINST.value, ROOT), runs)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 3600:
        raise UserError(f"EVERY={text}: seconds, from 0.1 to 3600")
    return value


if __name__ == "__main__":
    run(main)
