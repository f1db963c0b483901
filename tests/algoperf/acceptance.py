"""Acceptance of the submissions under AlgoPerf's own runner on a CPU. Takes minutes a workload.

``ALGOPERF_PYTHON=... python -m tests.algoperf.acceptance --data DIR --work DIR --out DIR`` runs,
for each variant and workload, on ``make data-algoperf-mini``'s data:

* two processes, batches recorded from AlgoPerf's pipeline;
* the same batches again, both processes killed half way and the run resumed, from a checkpoint of a
  few steps before, which already holds bases;
* the same global batches in one process, half by half, also killed and resumed;
* with ``--controls``, one process on the batches joined, and joined the other way round: what
  rounding alone does to a run. Eigenvectors of a singular factor are arbitrary in its null space,
  so from the first refresh on it does much, and equal gradients are what a comparison needs.

With ``--exported`` the submission is what ``make export-<variant>`` writes, in a folder of its own
where neither the optimizers nor the submissions of our package can be imported: only the modules
that start AlgoPerf's runner are copied beside it. With ``--ruleset=self`` it is the self-tuning
export, its point built in, under ``--tuning_ruleset=self`` and without a search space.

With ``--brief`` it is one process alone, killed half way and resumed, its batches AlgoPerf's.

What it measured goes to ``<out>/<variant>_<workload>.json`` and ``.csv`` (losses by step).
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
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
KILLED = {"two_killed": 1, "one_killed": -9, "killed": -9}


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
        self.space = self.work / "space.json"
        self.space.write_text(json.dumps([point]))
        self.point = point
        self.submission = f"submissions/{variant}/submission.py"
        self.cwd, self.tool = ROOT, TOOL
        if args.exported:
            self._export()

    def _export(self) -> None:
        """Set the folder up in which the exported submission is alone."""
        self.cwd = self.work / "alone"
        command = ["scripts/export.py", f"--variant={self.variant}", f"--out={self.cwd}"]
        command += [f"--ruleset={self.args.ruleset}", f"--search_space={self.space}"]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        folder = export.RULESETS[self.args.ruleset]
        self.submission = f"{folder}/{self.variant}/submission.py"
        package = ROOT / PACKAGE
        for name in ["", *standalone.modules_needed(package, STARTERS)]:
            file = package.joinpath(*name.split("."))
            source = file.with_suffix(".py") if name else package
            source = source if source.is_file() else file / "__init__.py"
            target = self.cwd / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        self.tool = Path(shutil.copy(TOOL, self.cwd))
        for module in ("optim", "submission"):
            code = f"import {PACKAGE}.{module}"
            found = subprocess.run(
                [PYTHON, "-c", code], cwd=self.cwd, env=self._environment(), capture_output=True
            )
            if b"ModuleNotFoundError" not in found.stderr:
                raise RuntimeError(f"{PACKAGE}.{module} can be imported in {self.cwd}")

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.cwd)}

    def run(self, name: str, processes: int, **environment: str) -> int:
        """One launch of the runner into the folder of ``name``; its exit code."""
        data = self.args.data / FOLDERS[self.workload]
        steps = self.args.steps
        start = ["-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
        start = [*start, f"--nproc_per_node={processes}"] if processes > 1 else []
        flags = {
            "framework": "pytorch",
            "workload": self.workload,
            "submission_path": self.submission,
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
        with (self.work / f"{name}.log").open("a") as log:
            return subprocess.run(
                [
                    PYTHON,
                    *start,
                    str(self.tool),
                    *(f"--{k}={v}" for k, v in flags.items()),
                    *switches,
                ],
                cwd=self.cwd,
                env={**self._environment(), **settings},
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


def accept(args: argparse.Namespace, variant: str, workload: str) -> dict[str, Any]:
    """All runs of one case, and what came of them."""
    case = Case(args, variant, workload)
    batches = case.work / "batches"
    batches.mkdir()
    middle = str(case.killed_before)
    codes = {"two": case.run("two", 2, RECORD=str(batches))}
    replay = {"REPLAY": str(batches)}
    codes["two_killed"] = case.run("two_resumed", 2, KILL_AT=middle, **replay)
    codes["two_resumed"] = case.run("two_resumed", 2, **replay)
    codes["one_killed"] = case.run("one_resumed", 1, KILL_AT=middle, HALVES="apart", **replay)
    codes["one_resumed"] = case.run("one_resumed", 1, HALVES="apart", **replay)
    runs = ["two", "two_resumed", "one_resumed"]
    if args.controls:
        for halves in ("joined", "swapped"):
            codes[halves] = case.run(halves, 1, HALVES=halves, **replay)
            runs.append(halves)
    traces = {name: case.trace(name) for name in runs}
    last = args.steps - 1
    losses = [entry["loss"] for _, entry in sorted(traces["two"].items())]
    quarter = len(losses) // 4
    result: dict[str, Any] = {
        **_setting(args, case, variant, workload),
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
            for name in runs
            if name.startswith("two")
        },
        "steps_seen": {name: len(trace) for name, trace in traces.items()},
        "resumed_equals_unbroken_two_bitwise": traces["two"][last]["hash"]
        == traces["two_resumed"][last]["hash"],
        "distance_resumed_unbroken_two": case.distance("two", "two_resumed"),
        "distance_one_two": case.distance("two", "one_resumed"),
        "eigenbasis": _last_counts(case.folder("two") / "measurements.csv"),
        "all_finite": all(math.isfinite(loss) for loss in losses),
        "resumed_from_step": _last_before_preemption(case.folder("two_resumed")),
        "evaluations": _rows(case.folder("two_resumed") / "eval_measurements.csv"),
        "checkpoints": sorted(p.name for p in case.folder("two_resumed").glob("checkpoint_*")),
    }
    if args.controls:
        result["distance_one_joined_two"] = case.distance("two", "joined")
        result["distance_one_joined_swapped"] = case.distance("joined", "swapped")
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
    kill_at = str(case.killed_before)
    codes = {"killed": case.run("one", 1, KILL_AT=kill_at), "resumed": case.run("one", 1)}
    trace = case.trace("one")
    folder = case.folder("one")
    losses = [entry["loss"] for _, entry in sorted(trace.items())]
    result: dict[str, Any] = {
        **_setting(args, case, variant, workload),
        "exit_codes": codes,
        "steps_seen": {"one": len(trace)},
        "losses": losses,
        "all_finite": all(math.isfinite(loss) for loss in losses),
        "resumed_from_step": _last_before_preemption(folder),
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
    for name, steps in result["steps_seen"].items():
        if steps != case.args.steps:
            found.append(f"{name}: {steps} steps of {case.args.steps}")
    if result["resumed_from_step"] != case.saved_after:
        found.append(f"resumed from step {result['resumed_from_step']}, not {case.saved_after}")
    if not result["all_finite"]:
        found.append("losses that are not finite")
    for name, equal in result.get("replicas_equal_at_every_step", {}).items():
        if not equal:
            found.append(f"{name}: replicas differ")
    if not result.get("resumed_equals_unbroken_two_bitwise", True):
        found.append("the resumed run is not the unbroken one")
    if result.get("distance_one_two", (0.0, 0.0)) != (0.0, 0.0):
        found.append("one process and two part on the same gradients")
    counts = {row["global_step"]: row for row in result["eigenbasis"]}
    if "precondition_frequency" in case.point:
        for step in (case.saved_after, case.args.steps):
            if not counts.get(step, {}).get("eigenbasis_refreshes"):
                found.append(f"no refresh by step {step}")
        if any(row["eigenbasis_failures"] for row in counts.values()):
            found.append("decompositions failed")
    return found


def _setting(
    args: argparse.Namespace, case: Case, variant: str, workload: str
) -> dict[str, Any]:
    """What a record begins with: what was run."""
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
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints")
    parser.add_argument("--prefix", default="", help="of the names of the files in --out")
    parser.add_argument("--ruleset", default="external", choices=sorted(export.RULESETS))
    parser.add_argument("--brief", action="store_true", help="one process, killed and resumed")
    parser.add_argument("--exported", action="store_true", help="the submission as exported")
    args = parser.parse_args()
    if args.ruleset == "self" and not args.exported:
        parser.error("--ruleset=self is of exports: give --exported too")
    args.data, args.work, args.out = (p.resolve() for p in (args.data, args.work, args.out))
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
            print({k: v for k, v in result.items() if k.startswith(("distance", "resumed"))})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
