"""Takes the flags of scripts/submit.py after a mode, and leaves a run's folder as it would."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from algoperf_shampoo.harness import run_lock, seal
from algoperf_shampoo.study import plan

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Train nothing, for a moment or forever."""
    mode, *flags = sys.argv[1:]
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    seed, out = given["seeds"].rstrip(","), Path(given["out"])
    inner = Path(given["variant"]) / f"study_{seed}" / f"{given['workload']}_mini_pytorch"
    event(out, f"start {seed}")
    if mode == "second_fails" and seed == "2":
        print("error: out of luck\n\nnext: make table1\n      (a hint)", flush=True)
        return 3
    with run_lock.hold(out / inner / "trial_1"):
        if mode == "forever":
            time.sleep(60)
        time.sleep(0.5)
        write_run(out / inner / "trial_1", given)
        print(f"seed {seed}: hit: accuracy 0.5 reached at step 1", flush=True)
        event(out, f"end {seed}")
    return 0


def write_run(folder: Path, given: dict[str, str]) -> None:
    """The folder of a finished run that hit at its first evaluation, whole and sealed."""
    asked = plan.make_plan(
        ROOT, [given["variant"]], given["workload"], seeds=given["seeds"], out=given["out"]
    )
    (run,) = asked.runs
    properties = {"target_metric_name": "accuracy", "validation_target_value": 0.5}
    meta = {f"workload.{name}": value for name, value in properties.items()}
    for name, content in (
        ("meta_data_0.json", {**meta, "rng_seed": run.seed}),
        ("flags_0.json", {"max_global_steps": run.max_steps}),
        ("hparams.json", run.hparams),
    ):
        (folder / name).write_text(json.dumps(content))
    columns = "global_step,accumulated_submission_time,total_duration,validation/accuracy"
    (folder / "eval_measurements.csv").write_text(f"{columns}\n1,1.0,2.0,0.6\n")
    identity = {
        "variant": run.variant,
        "workload": run.workload,
        "seed": run.seed,
        "trial": run.trial,
        "hparams": run.hparams,
        "workload_properties": {**properties, "max_steps": run.max_steps},
    }
    record = {
        "status": "finished",
        "identity": identity,
        "result": {"steps_to_target": 1, "time_to_target": 1.0, "global_step": 1},
        seal.FILES: seal.make(folder),
    }
    (folder / "run.json").write_text(json.dumps(seal.signed(record)))


def event(out: Path, text: str) -> None:
    """A line in a file that all of them share."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "events").open("a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
