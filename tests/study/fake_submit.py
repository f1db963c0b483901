"""Takes the flags of scripts/submit.py after a mode, and leaves a run's folder as it would."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from algoperf_shampoo.harness import run_lock


def main() -> int:
    """Train nothing, for a moment or forever."""
    mode, *flags = sys.argv[1:]
    given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
    seed, out = given["seeds"].rstrip(","), Path(given["out"])
    inner = Path(given["variant"]) / f"study_{seed}" / f"{given['workload']}_mini_pytorch"
    event(out, f"start {seed}")
    if mode == "second_fails" and seed == "2":
        print("error: out of luck", flush=True)
        return 3
    with run_lock.hold(out / inner / "trial_1"):
        if mode == "forever":
            time.sleep(60)
        time.sleep(0.5)
        record = out / inner / "trial_1" / "run.json"
        record.write_text(json.dumps({"status": "finished", "identity": {}}))
        print(f"seed {seed}: hit: accuracy 0.5 reached at step 1", flush=True)
        event(out, f"end {seed}")
    return 0


def event(out: Path, text: str) -> None:
    """A line in a file that all of them share."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "events").open("a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
