"""``kill -9`` of a two-process run under AlgoPerf's own runner, at ten moments. Takes an hour.

``ALGOPERF_PYTHON=... python -m tests.algoperf.kill_acceptance --data DIR --work DIR --out FILE``
trains ``--variant`` on ``make data-algoperf-mini``'s OGBG by ``make submit-... PROCESSES=2``, and
kills, in a run folder each, the launcher, torchrun, a worker, or make's process group; then gives
the same command again, every second time at once, without a look at what is left. Measured per
kill: how long any process of the launch lived on (30 s are allowed), and whether one was alive
when the next launch had got as far as torchrun. At the end each run is let to its end: its
evaluations must be one curve, as the log reader sees it, ``launches.json`` must say of every launch
how it ended, and its parameters must be those of an unbroken run of as many steps, to the bit
(resumed launches read past the batches already used: ``SHAMPOO_RESUME_DATA=replay``).
``--ruleset=self`` does it with the point built in, ``--frequency`` with a check of the bases every
so many steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from algoperf_shampoo.harness.algoperf import folder, processes
from algoperf_shampoo.study import logs
from algoperf_shampoo.study.plan import Plan, make_plan
from tests.algoperf import provenance

ROOT = Path(__file__).resolve().parents[2]
WHOM = ("launcher", "torchrun", "worker", "group")
# What the console must say, how often, and the seconds to wait then.
MOMENTS: tuple[tuple[str, str, int, float], ...] = (
    ("torchrun has started", "", 1, 0.0),
    ("both workers have started", "", 2, 0.0),
    ("building the data pipeline", "Initializing dataset", 1, 0.0),
    ("building the model", "Initializing model", 1, 0.5),
    ("before the first step", "Starting training loop", 1, 0.0),
    ("first steps", "Starting training loop", 1, 3.0),
    ("first evaluation logged", "Time since start", 1, 0.0),
    ("first checkpoint written", "Saved checkpoint", 1, 0.0),
    ("training after a checkpoint", "Saved checkpoint", 1, 2.0),
    ("second checkpoint being written", "Time since start", 2, 0.05),
)
ALLOWED = 30.0
MARK = "ALGOPERF_SHAMPOO_KILL_CASE"
REPLAY = {"SHAMPOO_RESUME_DATA": "replay"}


def make_data(source: Path, target: Path, period: int = 2) -> None:
    """The same OGBG, with small batches and an evaluation every ``period`` seconds."""
    target.mkdir(parents=True, exist_ok=True)
    manifest = json.loads((source / "minidata.json").read_text())
    entry = manifest["workloads"]["ogbg"]
    entry["global_batch_size"] = 8
    entry["max_global_steps"] = 1_000_000
    small = {name: 16 for name in entry["properties"] if name.endswith("_examples")}
    small.pop("num_train_examples")
    entry["properties"] |= {**small, "eval_batch_size": 16, "eval_period_time_sec": period}
    (target / "minidata.json").write_text(json.dumps({**manifest, "workloads": {"ogbg": entry}}))
    if not (target / "ogbg").exists():  # no link to the folder: its manifest would be the source's
        shutil.copytree(source / "ogbg", target / "ogbg")


class Launch:
    """One launch of the command, make, in a process group of its own."""

    def __init__(self, args: argparse.Namespace, out: Path, number: int, steps: int) -> None:
        self.number, self.marker = number, f"{out.name}-{number}"
        words = submit_words(args, args.work / "data", out, steps)
        made = plan_of(args, args.work / "data", out)
        self.run_dir = made.runs[0].run_dir
        self.console = self.run_dir / folder.CONSOLE
        self.from_byte = self.console.stat().st_size if self.console.exists() else 0
        with (args.work / f"{out.name}.log").open("a") as log:
            self.process = subprocess.Popen(
                words,
                cwd=ROOT,
                env={**outside_make(), MARK: self.marker, "PYTHONPATH": str(ROOT), **REPLAY},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def pids(self) -> tuple[int | None, list[int]]:
        """torchrun's pid, and the workers'."""
        below = processes.descendants(self.process.pid)
        torchrun = next((pid for pid in below if "torch.distributed.run" in command_of(pid)), None)
        workers = [pid for pid in below if command_of(pid).find("harness.algoperf.worker") > 0]
        return torchrun, [pid for pid in workers if pid != torchrun]

    def wait_for(self, moment: tuple[str, str, int, float]) -> None:
        """Return at the moment; RuntimeError if the launch ends before."""
        _, words, count, seconds = moment
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"launch {self.marker} ended early: {self.process.returncode}")
            if words:
                printed = self.console.read_bytes() if self.console.exists() else b""
                if printed[self.from_byte :].decode(errors="replace").count(words) >= count:
                    break
            else:
                torchrun, workers = self.pids()
                if (torchrun and count == 1) or len(workers) >= 2:
                    break
            time.sleep(0.02)
        time.sleep(seconds)

    def kill(self, whom: str) -> str:
        """kill -9; which process it was."""
        torchrun, workers = self.pids()
        if whom == "group":
            os.killpg(self.process.pid, signal.SIGKILL)
            return "group of make and the launcher"
        if whom == "worker" and not workers:  # at the first moment there is none yet
            while not workers:
                time.sleep(0.02)
                workers = self.pids()[1]
        rank = self.number % 2 if len(workers) > 1 else 0
        assert torchrun is not None
        chosen = {"launcher": parent_of(torchrun), "torchrun": torchrun}
        pid = workers[rank] if whom == "worker" else chosen[whom]
        os.kill(pid, signal.SIGKILL)
        return whom if whom != "worker" else f"worker, number {rank}"

    def alive(self) -> list[int]:
        """Every process of this launch, whoever its parent is: the mark is in its environment."""
        found = []
        wanted = f"{MARK}={self.marker}\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if wanted in path.read_bytes() + b"\0":
                    found.append(int(path.parent.name))
            except OSError:
                continue
        return found


def submit_words(args: argparse.Namespace, data: Path, out: Path, steps: int) -> list[str]:
    """The command of a user."""
    words = ["make", "--no-print-directory", f"submit-{args.variant.replace('_', '-')}"]
    words += ["VENV=none", f"PYTHON={sys.executable}", "WORKLOAD=ogbg", "SIZE=mini", "SEEDS=1"]
    words += ["HARNESS=algoperf", "PROCESSES=2", f"RULESET={args.ruleset}", f"STEPS={steps}"]
    words += [f"DATA_DIR={data}", f"OUT={out}"]
    return words + ([f"F={args.frequency}"] if args.frequency else [])


def plan_of(args: argparse.Namespace, data: Path, out: Path) -> Plan:
    """What the command will run: for the name of its folder."""
    return make_plan(
        ROOT,
        [args.variant],
        workload="ogbg",
        size="mini",
        harness="algoperf",
        data_dir=str(data),
        f=args.frequency,
        out=str(out),
        ruleset=args.ruleset,
    )


def outside_make() -> dict[str, str]:
    """The environment without what a make around us says to those below it."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}


def parent_of(pid: int) -> int:
    """The process that started it."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[1])


def command_of(pid: int) -> str:
    """Its command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def parameters(run_dir: Path, step: int) -> str:
    """sha256 of the parameters in a checkpoint of the runner."""
    content = torch.load(run_dir / f"checkpoint_{step}", map_location="cpu", weights_only=True)
    total = hashlib.sha256()
    for name, tensor in sorted(content["model_params"].items()):
        total.update(name.removeprefix("module.").encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def gone_after(launch: Launch, since: float) -> float | None:
    """Seconds until no process of the launch is left; None after twice the time allowed."""
    while launch.alive():
        launch.process.poll()
        if time.monotonic() - since > 2 * ALLOWED:
            return None
        time.sleep(0.05)
    return time.monotonic() - since


def accept(args: argparse.Namespace, whom: str) -> dict[str, Any]:
    """Kill one kind of process at every moment; what came of it."""
    out = args.work / f"killed_{whom}"
    kills: list[dict[str, Any]] = []
    launch = Launch(args, out, 0, 1_000_000)
    for number, moment in enumerate(MOMENTS, start=1):
        launch.wait_for(moment)
        killed = launch.kill(whom)
        since = time.monotonic()
        at_once = number % 2 == 0
        following = Launch(args, out, number, 1_000_000) if at_once else None
        seconds = gone_after(launch, since)
        launch.process.wait()
        following = following or Launch(args, out, number, 1_000_000)
        while following.pids()[0] is None and following.process.poll() is None:
            time.sleep(0.02)
        beside = launch.alive()  # when the next torchrun was there
        kills.append(
            {
                "moment": moment[0],
                "killed": killed,
                "launched_again": "at once" if at_once else "when it was gone",
                "last_process_gone_after_s": None if seconds is None else round(seconds, 2),
                "alive_beside_the_next": len(beside),
            }
        )
        print(whom, kills[-1], flush=True)
        launch = following
    launch.wait_for(MOMENTS[7])
    launch.kill("launcher")
    gone_after(launch, time.monotonic())
    launch.process.wait()
    step = max(int(path.name.split("_")[1]) for path in folder.checkpoints(launch.run_dir))
    last = Launch(args, out, len(MOMENTS) + 1, step + 5)
    code = last.process.wait()
    launches = json.loads((last.run_dir / folder.LAUNCHES).read_text())
    trial = logs.read_trial(last.run_dir)
    steps = [evaluation.step for evaluation in trial.evaluations]
    rows = (last.run_dir / "eval_measurements.csv").read_text().splitlines()[1:]
    result = {
        "kills": kills,
        "last_exit_code": code,
        "how": [entry["how"] for entry in launches],
        "from_step": [entry["from_step"] for entry in launches],
        "evaluated_at": steps,
        "rows": len(rows),
        "holes": trial.holes,
    }
    unbroken = Launch(args, args.work / f"unbroken_{whom}", 0, step + 5)
    if unbroken.process.wait() != 0:
        raise RuntimeError("the unbroken run failed")
    hashes = [parameters(launch.run_dir, step + 5) for launch in (last, unbroken)]
    result["parameters"], result["parameters_unbroken"] = hashes
    result["same_parameters"] = hashes[0] == hashes[1]
    result["one_curve"] = (
        code == 0 and len(rows) == len(steps) and steps == sorted(set(steps)) and not trial.holes
    )
    result["no_orphan_after_30_s"] = all(
        kill["last_process_gone_after_s"] is not None
        and kill["last_process_gone_after_s"] <= ALLOWED
        for kill in kills
    )
    result["never_beside_another"] = not any(kill["alive_beside_the_next"] for kill in kills)
    result["every_end_said"] = None not in result["how"] and len(launches) == len(MOMENTS) + 2
    return result


def main() -> int:
    """Run the cases; 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--whom", default=",".join(WHOM))
    parser.add_argument("--variant", default="nadamw")
    parser.add_argument("--frequency", help="F of the point; of variants with bases")
    parser.add_argument("--ruleset", default="external", choices=("external", "self"))
    args = parser.parse_args()
    args.data, args.work, args.out = (p.resolve() for p in (args.data, args.work, args.out))
    make_data(args.data, args.work / "data")
    results: dict[str, Any] = {
        "what": "kill -9 of a two-process run on ogbg_minidata under AlgoPerf's runner",
        **provenance.of_this_run(),
        "variant": args.variant,
        "ruleset": args.ruleset,
        "killed": {},
    }
    good = True
    for whom in args.whom.split(","):
        result = results["killed"][whom] = accept(args, whom)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        checks = ("one_curve", "same_parameters", "no_orphan_after_30_s", "never_beside_another")
        checks += ("every_end_said",)
        print(whom, {name: result[name] for name in checks}, flush=True)
        good = good and all(result[name] for name in checks)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
