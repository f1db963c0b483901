"""A run as one record of Weights & Biases, written from its own files when it has ended.

wandb begins a new record at every start of a process when it is offline (``resume`` has no effect
there), so a run that was killed twice would be three. Here the record is made when the run is over,
from the CSVs, and made anew if it is asked for again: one run, one record.

``python -m algoperf_shampoo.harness.tracking RUN_DIR NAME GROUP`` does so where wandb is installed.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import netrc
import os
import shutil
import sys
from pathlib import Path
from typing import Any

_PROJECT = "algoperf-shampoo"


def run_id(run_dir: Path) -> str:
    """The id of a run's record: its folder's."""
    return hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]


def is_offline() -> bool:
    """Whether wandb would keep records on disk: asked for by WANDB_MODE, or for want of a key."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode:
        return mode != "online"
    if os.environ.get("WANDB_API_KEY"):
        return False
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is None
    except (OSError, netrc.NetrcParseError):
        return True


def record(run_dir: Path, name: str, group: str) -> None:
    """Write the record of a run that has ended below its folder, or send it if there is a key.

    WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and WANDB_API_KEY are wandb's own.
    """
    import wandb

    own = run_id(run_dir)
    offline = is_offline()
    if offline:
        for old in (run_dir / "wandb").glob(f"offline-run-*-{own}"):
            shutil.rmtree(old)
    run = wandb.init(
        id=own,
        name=name,
        group=group,
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        dir=str(run_dir),
        config=_json(run_dir / "hparams.json"),
        mode="offline" if offline else "online",
        resume=None if offline else "allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    for step, values in curve(run_dir):
        run.log(values, step=step)
    for key, value in _json(run_dir / "run.json").get("result", {}).items():
        run.summary[key] = value
    run.finish()


def curve(run_dir: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and values of each evaluation and each step's loss, in the order of steps."""
    found: dict[int, dict[str, float]] = {}
    for name, prefix in (("step_losses.csv", "train/step_"), ("eval_measurements.csv", "")):
        path = run_dir / name
        if not path.is_file():
            continue
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = _number(row.pop("global_step", None))
                if math.isfinite(step):
                    values = {prefix + key: _number(value) for key, value in row.items() if value}
                    found.setdefault(int(step), {}).update(values)
    return sorted(found.items())


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    record(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
