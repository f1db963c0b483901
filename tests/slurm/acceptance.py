"""A study on a real Slurm of two nodes, disturbed in every way that a cluster disturbs: minutes.

``python tests/slurm/acceptance.py --work DIR --out FILE`` (as root, with Debian's slurmctld,
slurmd, slurm-client and munge) starts ``cluster.sh``, submits the minis of OGBG by ``make study``'s
own script, and while they train

* submits a job of a higher partition, so that one run is preempted and requeued;
* drains a node: its runs end there, and none starts;
* sets the other node down: its runs are requeued;
* submits a run with too little memory: it is killed; then ``make study`` again, with enough.

All along what ``make status`` shows is compared with what Slurm says. At the end every run must be
the unbroken run to the bit: the same final parameters and the same evaluations as one trained here
without Slurm.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from algoperf_shampoo.harness import run_lock
from algoperf_shampoo.harness.spec import RunSpec
from algoperf_shampoo.study import progress, slurm, status, study

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
VARIANTS = ("nadamw", "shampoo_grafting", "eshampoo_fixed", "eshampoo_adaptive")
PATIENCE = 900.0
ENOUGH, TOO_LITTLE = "1500M", "60M"


class Monitor(threading.Thread):
    """Looks again and again, and keeps what of the status disagrees with Slurm's queue."""

    def __init__(self, runs: list[RunSpec]) -> None:
        super().__init__(daemon=True)
        self.runs, self.looks, self.wrong = runs, 0, list[str]()
        self.seen: dict[str, set[str]] = {run.name: set() for run in runs}
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.5):
            before = slurm.queue()
            found = status.look(self.runs, before)
            if slurm.queue() != before:
                continue  # it changed while we looked: nothing to hold it to
            self.looks += 1
            for run, now in found:
                self.seen[run.name].add(now.state)
                job = before.get(run.run_dir, "")
                allowed = self.allowed(job, now.state)
                if now.state not in allowed:
                    said = job or "nothing"
                    self.wrong.append(f"{run.name}: {now.state} while Slurm says {said}")

    @staticmethod
    def allowed(job: str, state: str) -> set[str]:
        if " pending" in job:
            return {status.QUEUED}
        if job:  # starting, training, or ending
            return {status.QUEUED, progress.RUNNING, progress.DONE}
        return {progress.DONE, progress.STOPPED, progress.FAILED, progress.MISSING}


def ask(*command: str) -> str:
    """Output of a command of Slurm's."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def wait_until(what: str, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(0.2)
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def jobs(node: str | None = None, state: str = "running") -> set[str]:
    """Array tasks of the low partition in a state, on a node, as "JOB_TASK"."""
    where = [f"--nodelist={node}"] if node else []
    fields = ["--noheader", "--array", "--partition=low", f"--states={state}", "--format=%i"]
    return set(ask("squeue", *fields, *where).split())


def restarts(job: str) -> int:
    text = ask("scontrol", "show", "job", job)
    return int(text.split("Restarts=")[1].split()[0])


def script(script: str, name: Path, out: Path) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / script), f"--study={name}", f"--out={out}"]


def launch(name: Path, out: Path, *more: str) -> str:
    """``make study`` there; what it prints."""
    command = [*script("study.py", name, out), *more]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise RuntimeError(f"make study: exit code {done.returncode}")
    return done.stdout


def shown(name: Path, out: Path) -> str:
    """``make status``'s second line, the sums."""
    command = script("status.py", name, out)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[1]


def write_study(path: Path, workload: str, variants: tuple[str, ...], seeds: int) -> Path:
    rows = [{"workload": workload, "variant": variant} for variant in variants]
    path.write_text(json.dumps({"title": path.stem, "mini": {"seeds": seeds}, "rows": rows}))
    return path


def disturb(out: Path, name: Path, small: Path) -> dict[str, Any]:
    """Submit, disturb, and wait for the end."""
    runs = [job.run for job in study.lay_out(ROOT, str(name), study.Options(out=str(out))).jobs]
    (over,) = [job.run for job in study.lay_out(ROOT, str(small), study.Options(out=str(out))).jobs]
    words = ["--launcher=slurm", "--partition=low", "--cpus=1", "--time=30"]
    launch(name, out, *words, f"--mem={ENOUGH}")
    monitor = Monitor(runs)
    monitor.start()
    result: dict[str, Any] = {"sums": {}}
    wait_until("four runs train", lambda: sum(begun(run) for run in runs) >= 4)
    result["sums"]["training"] = shown(name, out)
    again = launch(name, out, *words, f"--mem={ENOUGH}")
    result["a second make study submits nothing"] = f"0 of {len(runs)} runs to launch" in again

    there = jobs("n1")
    high = ["--partition=high", "--nodelist=n1", "--mem=100M", "--output=/dev/null"]
    ask("sbatch", *high, "--wrap=sleep 5")
    wait_until("a run is preempted", lambda: any(restarts(job) for job in there))
    result["preempted"] = [job for job in there if restarts(job)]

    ask("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    on_n2 = jobs("n2")
    result["sums"]["one node drained"] = shown(name, out)
    result["started on the drained node"] = sorted(jobs("n2") - on_n2)

    wait_until("both cores of the other node train", lambda: len(jobs("n1")) == 2)
    there = jobs("n1")
    before = {job: restarts(job) for job in there}
    ask("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=test")
    wait_until("the runs of the node that is down wait", lambda: there <= jobs(state="pending"))
    result["sums"]["one node down"] = shown(name, out)
    result["requeued"] = sorted(job for job in there if restarts(job) > before[job])
    result["lost with the node"] = sorted(there)
    wait_until("the drained node's runs have ended", lambda: not jobs("n2"))
    result["started on the drained node"] += sorted(jobs("n2") - on_n2)
    for node in ("n1", "n2"):  # refused for one that has come back by itself
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"])
    out_of_use = ["sinfo", "--noheader", "--partition=low", "--states=drain,down", "--format=%N"]
    wait_until("both nodes take jobs", lambda: not ask(*out_of_use).strip())
    for job in jobs(state="pending"):  # Slurm lets what it requeues wait for two minutes
        ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    launch(small, out, *words, f"--mem={TOO_LITTLE}")
    wait_until("the run over its memory is gone", lambda: over.run_dir not in slurm.queue())
    now = progress.of(over.run_dir)
    result["over its memory"] = {"state": now.state, "note": now.note}
    result["its log"] = [line for log in (out / ".study").rglob("*.log") for line in memory(log)]
    launch(small, out, *words, f"--mem={ENOUGH}")
    wait_until("every run is done", lambda: done([*runs, over]))
    wait_until("the queue is empty", lambda: not slurm.queue())
    result["sums"]["at the end"] = shown(name, out)
    monitor.over.set()
    monitor.join()
    result["looks at the status"] = monitor.looks
    result["looks that disagreed with Slurm"] = monitor.wrong
    result["states seen"] = {name: sorted(states) for name, states in monitor.seen.items()}
    return result


def begun(run: RunSpec) -> bool:
    """It trains, and has evaluated once (or has even ended)."""
    return progress.of(run.run_dir).step is not None and (
        run_lock.held(run.run_dir) or progress.of(run.run_dir).state == progress.DONE
    )


def done(runs: list[RunSpec]) -> bool:
    return all(progress.of(run.run_dir).state == progress.DONE for run in runs)


def memory(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if "memory limit" in line]


def curve(run_dir: Path) -> tuple[str, list[tuple[str, str]], int]:
    """Hash of the final parameters, evaluations, and number of sessions."""
    record = json.loads((run_dir / "run.json").read_text())
    with (run_dir / "eval_measurements.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    metric = next(name for name in rows[0] if name.startswith("validation/m") or "accuracy" in name)
    values = [(row["global_step"], row[metric]) for row in rows]
    return record["result"]["params_sha256"], values, len(record["sessions"])


def main() -> int:
    """Run it; 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"SLURM_CONF": str(work / "slurm" / "slurm.conf"), "OMP_NUM_THREADS": "1"}
    name = write_study(work / "disturbed.json", "ogbg", VARIANTS, seeds=3)
    small = write_study(work / "memory.json", "imagenet_vit", ("nadamw",), seeds=1)
    subprocess.run([str(CLUSTER), "stop", str(work / "slurm")], check=True)
    subprocess.run([str(CLUSTER), "start", str(work / "slurm")], check=True)
    try:
        result = disturb(work / "out", name, small)
    finally:
        subprocess.run([str(CLUSTER), "stop", str(work / "slurm")], check=True)
    compared = {}
    for path in (name, small):
        launch(path, work / "unbroken", "--jobs=2")
        for job in study.lay_out(ROOT, str(path), study.Options(out=str(work / "out"))).jobs:
            own = job.run.run_dir
            sha, values, sessions = curve(own)
            other = curve(work / "unbroken" / own.relative_to(work / "out"))
            compared[job.run.name] = {
                "sessions": sessions,
                "parameters equal to the unbroken run's": sha == other[0],
                "evaluations equal": values == other[1],
            }
    result["runs"] = compared
    result["slurm"] = ask("sbatch", "--version").strip()
    result["commit"] = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    good = (
        result["a second make study submits nothing"]
        and len(result["preempted"]) == 1
        and not result["started on the drained node"]
        and result["requeued"] == result["lost with the node"] != []
        and result["over its memory"]["state"] in (progress.STOPPED, progress.MISSING)
        and not result["looks that disagreed with Slurm"]
        and all(all(list(entry.values())[1:]) for entry in compared.values())
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**result, "good": bool(good)}, indent=1) + "\n")
    print(json.dumps(result, indent=1), "good" if good else "NOT GOOD", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
