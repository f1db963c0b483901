"""Acceptance of the submissions under AlgoPerf's own runner on a CPU. Takes minutes a workload.

``ALGOPERF_PYTHON=... python -m tests.algoperf.acceptance --data DIR --work DIR --out DIR`` runs,
for each variant and workload, on ``make data-algoperf-mini``'s data, two processes whose batches
are recorded from AlgoPerf's pipeline, and then, on the same batches, those of ``--runs``:

* ``two_resumed``: both processes killed half way and the run resumed, from a checkpoint of a few
  steps before, which already holds bases;
* ``exported_resumed``: the same of what ``make export-<variant>`` writes, in a folder of its own
  where neither the optimizers nor the submissions of our package can be imported: only the modules
  that start AlgoPerf's runner are copied beside it;
* ``one_resumed``: the same global batches in one process, half by half, also killed and resumed;
* ``joined``, ``swapped``: one process on the batches joined, and joined the other way round: what
  rounding alone does to a run. Eigenvectors of a singular factor are arbitrary in its null space,
  so from the first refresh on it does much, and equal gradients are what a comparison needs.

The first three must end with the parameters of the unbroken run, to the bit. With ``--sharding=on``
the two processes share the optimizer's work; one process, whose stacks are larger, then rounds
otherwise, so leave it out of ``--runs``.

With ``--exported`` every run is of the exported submission. With ``--ruleset=self`` it is the
self-tuning export, its point built in, under ``--tuning_ruleset=self`` and without a search space.

With ``--brief`` it is one process alone, killed half way and resumed, its batches AlgoPerf's.

What it measured goes to ``<out>/<variant>_<workload>.json`` and ``.csv`` (losses by step).
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo.harness import standalone, submission_loader
from algoperf_shampoo.study import export
from tests.algoperf import provenance

ROOT = Path(__file__).resolve().parents[2]
TOOL = Path(__file__).with_name("instrumented_runner.py")
FOLDERS = {
    "mnist": ".",
    "fastmri_minidata": "fastmri",
    "imagenet_vit_minidata": "imagenet/pytorch",
    "ogbg_minidata": "ogbg",
}
BATCH = {"mnist": 64, "fastmri_minidata": 2, "imagenet_vit_minidata": 8, "ogbg_minidata": 32}
# MNIST's pipeline shuffles 16 batches of an evaluation, of 10,000 examples each: ten seconds.
EVAL_BATCH = {"mnist": 1000}
PYTHON = os.environ.get("ALGOPERF_PYTHON", sys.executable)
PACKAGE = "algoperf_shampoo"
STARTERS = ["harness.algoperf.runner", "harness.algoperf.worker"]
# Launches that are killed, and how they end: torchrun says 1 of a worker's death.
KILLED = {"two_killed": 1, "exported_killed": 1, "one_killed": -9, "killed": -9}
# Runs on recorded batches: processes, and how one process takes the two halves.
RUNS = {
    "two_resumed": (2, ""),
    "exported_resumed": (2, ""),
    "one_resumed": (1, "apart"),
    "joined": (1, "joined"),
    "swapped": (1, "swapped"),
}


@dataclass(frozen=True)
class Place:
    """Where a submission is imported from, the tool that starts it, and its path there."""

    cwd: Path
    tool: Path
    submission: str


class Case:
    """One variant on one workload."""

    def __init__(self, args: argparse.Namespace, variant: str, workload: str) -> None:
        self.args, self.variant, self.workload = args, variant, workload
        self.killed_before = args.steps // 2 + 1  # counted from 0
        # After a check of the bases, and some steps before the kill: they are done again.
        self.saved_after = 3 * args.steps // 8
        self.work = args.work / f"{variant}_{workload}"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        point = json.loads((ROOT / "search_spaces" / f"{variant}.json").read_text())[0]
        if "precondition_frequency" in point:
            point["precondition_frequency"] = args.frequency
        if args.tau is not None and "tau" in point:
            point["tau"] = args.tau
        if args.sharding and "max_preconditioner_dim" in point:
            point["sharding"] = args.sharding
        self.space = self.work / "space.json"
        self.space.write_text(json.dumps([point]))
        self.point = point
        self.package = Place(ROOT, TOOL, f"submissions/{variant}/submission.py")
        if args.exported:
            self.package = self.exported

    @functools.cached_property
    def exported(self) -> Place:
        """The folder in which the exported submission is alone."""
        cwd = self.work / "alone"
        command = ["scripts/export.py", f"--variant={self.variant}", f"--out={cwd}"]
        command += [f"--ruleset={self.args.ruleset}", f"--search_space={self.space}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        folder = export.RULESETS[self.args.ruleset]
        package = ROOT / PACKAGE
        for name in ["", *standalone.modules_needed(package, STARTERS)]:
            file = package.joinpath(*name.split("."))
            source = file.with_suffix(".py") if name else package
            source = source if source.is_file() else file / "__init__.py"
            target = cwd / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        place = Place(cwd, Path(shutil.copy(TOOL, cwd)), f"{folder}/{self.variant}/submission.py")
        for module in ("optim", "submission"):
            code = f"import {PACKAGE}.{module}"
            found = subprocess.run(
                [PYTHON, "-c", code], cwd=cwd, env=environment_in(cwd), capture_output=True
            )
            if b"ModuleNotFoundError" not in found.stderr:
                raise RuntimeError(f"{PACKAGE}.{module} can be imported in {cwd}")
        return place

    def run(self, name: str, processes: int, place: Place | None = None, **environment: str) -> int:
        """One launch of the runner into the folder of ``name``; its exit code."""
        place = place or self.package
        data = self.args.data / FOLDERS[self.workload]
        steps = self.args.steps
        start = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
        start = [*start, f"--nproc_per_node={processes}"] if processes > 1 else []
        flags = {
            "framework": "pytorch",
            "workload": self.workload,
            "submission_path": place.submission,
            "tuning_ruleset": self.args.ruleset,
            "data_dir": data,
            "experiment_dir": self.work,
            "experiment_name": name,
            "rng_seed": 1,
            "max_global_steps": steps,
        }
        if "imagenet" in self.workload:
            flags["imagenet_v2_data_dir"] = data
        if self.args.ruleset == "external":
            flags["tuning_search_space"] = self.space
        own = EVAL_BATCH.get(self.workload)
        switches = ["--resume_last_run", "--notorch_compile"]
        if environment.get("HALVES") in ("joined", "swapped"):
            switches.append("--skip_evals")
        settings = {
            # The schedule ends at 0.6 of the step hint: past the run.
            "STEP_HINT": str(math.ceil(steps / 0.6) + 20),
            "EVAL_AFTER": str(self.saved_after),
            "BATCH": str(BATCH[self.workload]),
            **({"EVAL_BATCH": str(own)} if own else {}),
            "TRACE": str(self.work / name),
            "OMP_NUM_THREADS": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **environment,
        }
        # As the door does: left to the runner, one rank reads it while the other writes it.
        point = self.folder(name) / "hparams.json"
        if not point.exists():
            point.parent.mkdir(parents=True)
            point.write_text(json.dumps(self.point))
        with (self.work / f"{name}.log").open("a") as log:
            return subprocess.run(
                [
                    PYTHON,
                    *start,
                    str(place.tool),
                    *(f"--{k}={v}" for k, v in flags.items()),
                    *switches,
                ],
                cwd=place.cwd,
                env={**environment_in(place.cwd), **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            ).returncode

    def trace(self, name: str, rank: int = 0) -> dict[int, dict[str, Any]]:
        """Losses and hashes by step; a step that was done again counts as it was the last time."""
        path = self.work / f"{name}.{rank}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {line["step"]: line for line in lines}

    def folder(self, name: str) -> Path:
        """Trial folder of a run."""
        return self.work / name / f"{self.workload}_pytorch" / "trial_1"

    def distance(self, one: str, other: str) -> tuple[float, float]:
        """Relative distance of the final parameters: of all together, and the largest tensor's."""
        code = (
            "import sys, torch\n"
            "a, b = (torch.load(p, map_location='cpu')['model_params'] for p in sys.argv[1:])\n"
            "d = {k: (a[k].double() - b[k].double()).norm().item() for k in a}\n"
            "n = {k: a[k].double().norm().item() for k in a}\n"
            "total = lambda v: sum(x * x for x in v.values()) ** 0.5\n"
            "print(total(d) / total(n), max(d[k] / n[k] for k in a if n[k] > 0))\n"
        )
        paths = [self.folder(name) / f"checkpoint_{self.args.steps}" for name in (one, other)]
        out = subprocess.run(
            [PYTHON, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True
        )
        whole, worst = out.stdout.split()
        return float(whole), float(worst)


def environment_in(cwd: Path) -> dict[str, str]:
    """Ours, with that folder to import from."""
    return {**os.environ, "PYTHONPATH": str(cwd)}


def launch(case: Case, name: str, batches: Path) -> dict[str, int]:
    """A run of :data:`RUNS` on recorded batches; the exit code of each of its launches."""
    processes, halves = RUNS[name]
    place = case.exported if name.startswith("exported") else None
    words = {"REPLAY": str(batches), **({"HALVES": halves} if halves else {})}
    if not name.endswith("_resumed"):
        return {name: case.run(name, processes, place, **words)}
    kill_at = str(case.killed_before)
    killed = case.run(name, processes, place, KILL_AT=kill_at, **words)
    key = name.replace("_resumed", "_killed")
    return {key: killed, name: case.run(name, processes, place, **words)}


def accept(args: argparse.Namespace, variant: str, workload: str) -> dict[str, Any]:
    """All runs of one case, and what came of them."""
    case = Case(args, variant, workload)
    setting = _setting(args, case, variant, workload)
    batches = case.work / "batches"
    batches.mkdir()
    codes = {"two": case.run("two", 2, RECORD=str(batches))}
    runs = ["two", *args.runs]
    for name in args.runs:
        codes |= launch(case, name, batches)
    traces = {name: case.trace(name) for name in runs}
    resumed = [name for name in runs if name.endswith("_resumed")]
    last = args.steps - 1
    equal = {name: traces[name][last]["hash"] == traces["two"][last]["hash"] for name in resumed}
    losses = [entry["loss"] for _, entry in sorted(traces["two"].items())]
    quarter = len(losses) // 4
    of_two = [name for name in runs if name == "two" or RUNS[name][0] == 2]
    result: dict[str, Any] = {
        **setting,
        "exit_codes": codes,
        "loss_first_last_quarter": [
            sum(losses[:quarter]) / quarter,
            sum(losses[-quarter:]) / quarter,
        ],
        "replicas_equal_at_every_step": {
            name: all(
                case.trace(name, 1)[step]["hash"] == entry["hash"]
                for step, entry in traces[name].items()
            )
            for name in of_two
        },
        # By rank: the factors whose state it keeps, and those of all ranks.
        "factors_kept": {
            name: [case.trace(name, rank)[last]["factors_kept"] for rank in (0, 1)]
            for name in of_two
        },
        "steps_seen": {name: len(trace) for name, trace in traces.items()},
        "ends_as_the_unbroken_run_bitwise": equal,
        "distance_from_the_unbroken_run": {
            name: case.distance("two", name) for name in args.runs if not equal.get(name)
        },
        "eigenbasis": _last_counts(case.folder("two") / "measurements.csv"),
        "all_finite": all(math.isfinite(loss) for loss in losses),
        "resumed_from_step": {name: _last_before_preemption(case.folder(name)) for name in resumed},
        "evaluations": {
            name: _rows(case.folder(name) / "eval_measurements.csv")
            for name in runs
            if name not in ("joined", "swapped")
        },
    }
    if {"joined", "swapped"} <= {*runs}:
        result["distance_joined_swapped"] = case.distance("joined", "swapped")
    result["wrong"] = wrong(case, result)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{args.prefix}{variant}_{workload}"
    (args.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    with (args.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *runs])
        for step in range(args.steps):
            writer.writerow([step, *(f"{traces[name][step]['loss']:.9g}" for name in runs)])
    shutil.rmtree(batches)
    if not args.keep:
        for path in case.work.rglob("checkpoint_*"):
            path.unlink()
    return result


def accept_briefly(args: argparse.Namespace, variant: str, workload: str) -> dict[str, Any]:
    """One process, killed half way and resumed; what came of it."""
    case = Case(args, variant, workload)
    setting = _setting(args, case, variant, workload)
    kill_at = str(case.killed_before)
    codes = {"killed": case.run("one", 1, KILL_AT=kill_at), "resumed": case.run("one", 1)}
    trace = case.trace("one")
    folder = case.folder("one")
    losses = [entry["loss"] for _, entry in sorted(trace.items())]
    result: dict[str, Any] = {
        **setting,
        "exit_codes": codes,
        "steps_seen": {"one": len(trace)},
        "losses": losses,
        "all_finite": all(math.isfinite(loss) for loss in losses),
        "resumed_from_step": {"one": _last_before_preemption(folder)},
        "eigenbasis": _last_counts(folder / "measurements.csv"),
        "evaluations": _rows(folder / "eval_measurements.csv"),
        "checkpoints": sorted(p.name for p in folder.glob("checkpoint_*")),
    }
    result["wrong"] = wrong(case, result)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.prefix}{variant}_{workload}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return result


def wrong(case: Case, result: dict[str, Any]) -> list[str]:
    """What of a record is not as it should be, a line each."""
    codes = result["exit_codes"]
    found = [
        f"{name}: exit code {code}" for name, code in codes.items() if code != KILLED.get(name, 0)
    ]
    if any(result[name] != now for name, now in provenance.sources().items()):
        found.append("the sources changed while it ran")
    for name, steps in result["steps_seen"].items():
        if steps != case.args.steps:
            found.append(f"{name}: {steps} steps of {case.args.steps}")
    for name, step in result["resumed_from_step"].items():
        if step != case.saved_after:
            found.append(f"{name}: resumed from step {step:g}, not {case.saved_after}")
    if not result["all_finite"]:
        found.append("losses that are not finite")
    for name, equal in result.get("replicas_equal_at_every_step", {}).items():
        if not equal:
            found.append(f"{name}: replicas differ")
    for name, equal in result.get("ends_as_the_unbroken_run_bitwise", {}).items():
        if not equal:
            found.append(f"{name}: not the unbroken run's parameters")
    for name, kept in result.get("factors_kept", {}).items():
        if not _kept_as(case.point.get("sharding", "auto"), kept):
            found.append(f"{name}: factors kept by the ranks, and all: {kept}")
    counts = {row["global_step"]: row for row in result["eigenbasis"]}
    if "precondition_frequency" in case.point:
        for step in (case.saved_after, case.args.steps):
            if not counts.get(step, {}).get("eigenbasis_refreshes"):
                found.append(f"no refresh by step {step}")
        if any(row["eigenbasis_failures"] for row in counts.values()):
            found.append("decompositions failed")
    return found


def _kept_as(sharding: str, kept: list[list[int] | None]) -> bool:
    """Whether ranks keep each factor once ("on"), or every rank all ("off"); "auto": either.

    kept: by rank, its own and those of all ranks; None of an optimizer without factors.
    """
    pairs = [pair for pair in kept if pair is not None]
    if not pairs:
        return sharding == "auto"
    own, everywhere = [pair[0] for pair in pairs], pairs[0][1]
    once = sum(own) == everywhere and min(own) > 0
    every = own == [everywhere] * len(kept)
    return {"on": once, "off": every, "auto": once or every}[sharding]


def _setting(args: argparse.Namespace, case: Case, variant: str, workload: str) -> dict[str, Any]:
    """What a record begins with: what is about to be run."""
    return {
        "variant": variant,
        "workload": workload,
        "submission": "exported, without the package" if args.exported else "in the package",
        "ruleset": args.ruleset,
        **provenance.of_this_run(),
        "point": case.point,
        "steps": args.steps,
        "killed_before_step": case.killed_before,
        "global_batch_size": BATCH[workload],
        "model": _model(workload),
    }


def _model(workload: str) -> str:
    if "vit" in workload:
        return f"ViT {os.environ.get('VIT_VARIANT', 'S/16')} of AlgoPerf; the workload's is S/16"
    if "fastmri" in workload:
        return f"num_channels {os.environ.get('FASTMRI_CHANNELS', '32')}; the workload's is 32"
    return "the workload's"


def _last_counts(path: Path) -> list[dict[str, float]]:
    """The eigenbasis counters in the log: step, checks, refreshes, failures."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("eigenbasis_checks")]
    names = ("global_step", "eigenbasis_checks", "eigenbasis_refreshes", "eigenbasis_failures")
    return [{name: float(row[name]) for name in names} for row in rows]


def _last_before_preemption(folder: Path) -> float:
    """Step of the checkpoint that was gone on from: the runner saves at each evaluation."""
    rows = _rows(folder / "eval_measurements.csv")
    return max(row["global_step"] for row in rows if not row["preemption_count"])


def _rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    keep = ("global_step", "preemption_count", "train/loss", "validation/loss")
    return [{name: float(row[name]) for name in keep} for row in rows]


def main() -> int:
    """Run the cases; 1 if one is not as it should be, or did not even run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", default=",".join(submission_loader.variants(ROOT)))
    parser.add_argument("--workloads", default=",".join(FOLDERS))
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--frequency", type=int, default=5)
    parser.add_argument("--tau", type=float)
    parser.add_argument("--sharding", choices=("auto", "on", "off"), help="of the point")
    parser.add_argument("--runs", default="two_resumed,exported_resumed,one_resumed")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--prefix", default="", help="of the names of the files in --out")
    parser.add_argument("--ruleset", default="external", choices=sorted(export.RULESETS))
    parser.add_argument("--brief", action="store_true", help="one process, killed and resumed")
    parser.add_argument("--exported", action="store_true", help="the submission as exported")
    args = parser.parse_args()
    if args.ruleset == "self" and not args.exported:
        parser.error("--ruleset=self is of exports: give --exported too")
    args.data, args.work, args.out = (p.resolve() for p in (args.data, args.work, args.out))
    args.runs = [name for name in args.runs.split(",") if name]
    if unknown := {*args.runs} - {*RUNS}:
        parser.error(f"--runs: there is {', '.join(RUNS)}, not {', '.join(sorted(unknown))}")
    failed = 0
    for workload in args.workloads.split(","):
        for variant in args.variants.split(","):
            try:
                result = (accept_briefly if args.brief else accept)(args, variant, workload)
            except Exception as error:  # the other cases are still to be run
                failed += 1
                print(f"{variant} {workload}: {type(error).__name__}: {error}", flush=True)
                continue
            failed += bool(result["wrong"])
            print(variant, workload, "; ".join(result["wrong"]) or "good")
            shown = ("exit_codes", "loss_first_last_quarter", "replicas_equal_at_every_step")
            shown += ("steps_seen", "all_finite", "checkpoints")
            print(variant, workload, {k: result[k] for k in shown if k in result}, flush=True)
            print({k: v for k, v in result.items() if k.startswith(("ends", "dist", "resumed"))})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
