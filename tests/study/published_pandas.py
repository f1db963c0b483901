"""Hits, steps and times of published logs by pandas, for the log reader to be held against.

``python -m tests.study.published_pandas FOLDER...`` compares the reader with it on every trial
folder below some folders; ``--write`` makes ``tests/data/published/expected.json`` anew.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data" / "published"
LOWER_IS_BETTER = ("loss", "ppl", "wer")


def first_hit(folder: Path) -> tuple[int, float] | None:
    """Step and submission time of the first evaluation at the target; None of no hit, no file."""
    import pandas

    try:
        meta = json.loads((folder / "meta_data_0.json").read_text())
        frame = pandas.read_csv(folder / "eval_measurements.csv")
    except FileNotFoundError:
        return None
    metric, target = (
        meta[f"workload.{key}"] for key in ("target_metric_name", "validation_target_value")
    )
    values = frame[f"validation/{metric}"]
    reached = frame[values.le(target) if metric in LOWER_IS_BETTER else values.ge(target)]
    if reached.empty:
        return None
    row = reached.iloc[0]
    return int(row["global_step"]), float(row["accumulated_submission_time"])


def same(one: Any, other: Any) -> bool:
    """Equal steps, and times equal but for the last digits, which pandas may round otherwise."""
    if not one or not other:
        return not one and not other
    return bool(one[0] == other[0] and math.isclose(one[1], other[1], rel_tol=1e-12))


def folders(root: Path) -> list[Path]:
    """Every ``trial_N`` below a folder."""
    return sorted(path for path in root.rglob("trial_*") if path.is_dir())


def differences(root: Path) -> tuple[int, list[str]]:
    """The number of trials below ``root``, and where pandas and the reader differ."""
    from algoperf_shampoo.study import logs

    found, own = {t.path: t for t in logs.find_trials([root])}, folders(root.absolute())
    wrong = [f"{path}: not read" for path in own if path not in found]
    for path, trial in found.items():
        hit: Any = first_hit(path)
        read = trial.steps_to_target and (trial.steps_to_target, trial.time_to_target)
        if not same(read, hit):
            wrong.append(f"{path}: pandas {hit}, the reader {read} ({trial.holes})")
    return len(own), wrong


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        made = {path.relative_to(DATA).as_posix(): first_hit(path) for path in folders(DATA)}
        (DATA / "expected.json").write_text(json.dumps(made, indent=1) + "\n")
    for name in sys.argv[1:]:
        if name != "--write":
            count, wrong = differences(Path(name))
            print(f"{name}: {count} trials, {len(wrong)} differ", *wrong, sep="\n")
