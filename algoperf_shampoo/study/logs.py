"""One reader for run folders in AlgoPerf's layout, whoever wrote them.

It takes embedded runs, runs of the real harness and the published logs alike, told apart by what
lies in the folder. The target is the one the run itself logged; a hit is the first evaluation whose
validation metric reaches it, and its time is that row's ``accumulated_submission_time``. What a log
lacks is listed in :attr:`Trial.holes`; nothing is filled in.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.spec import MINI, MINIDATA

_FRAMEWORKS = ("pytorch", "jax")


@dataclass(frozen=True)
class Evaluation:
    """One row of ``eval_measurements.csv``: times in seconds, metric on the validation split."""

    step: int
    submission_time: float
    value: float
    row: dict[str, float] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Trial:
    """One ``trial_N`` folder, read.

    ``outcome`` is "hit", "miss" (the budget was spent short of the target), "unfinished" (an
    embedded run still going, or killed) or "unknown" (the log does not say; see ``holes``).
    ``steps_to_target`` and ``time_to_target`` (seconds) are None unless the outcome is a hit.
    """

    path: Path
    source: str
    label: str
    study: str
    workload: str
    framework: str
    trial: int
    seed: int | None
    metric: str | None
    target: float | None
    step_hint: int | None
    hparams: dict[str, Any] | None
    evaluations: list[Evaluation]
    holes: list[str]
    outcome: str
    steps_to_target: int | None
    time_to_target: float | None


def find_trials(roots: Iterable[Path]) -> list[Trial]:
    """Every trial below ``roots``, in the order of their paths.

    Raises:
        UserError: a root does not exist.
    """
    found: list[Path] = []
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder of runs")
        found += [path for path in root.rglob("trial_*") if is_trial(path)]
        if is_trial(root):
            found.append(root)
    return [read_trial(path) for path in sorted(set(found), key=_natural)]


def is_trial(path: Path) -> bool:
    """Whether a path is a folder LABEL/study_K/WORKLOAD_FRAMEWORK/trial_N."""
    return bool(
        path.is_dir()
        and re.fullmatch(r"trial_\d+", path.name)
        and path.parent.name.endswith(tuple(f"_{name}" for name in _FRAMEWORKS))
    )


def read_trial(path: Path) -> Trial:
    """Read one trial folder.

    Raises:
        UserError: the folder is not LABEL/study_K/WORKLOAD_FRAMEWORK/trial_N.
    """
    path = path.absolute()
    if not is_trial(path):
        raise UserError(f"{path}: not a folder study_K/WORKLOAD_pytorch/trial_N of a run")
    workload, _, framework = path.parent.name.rpartition("_")
    holes: list[str] = []
    meta = _read_json(_first(path, "meta_data_*.json"), holes, "meta_data_0.json") or {}
    record = _read_json(path / "run.json", holes, None)
    metric = meta.get("workload.target_metric_name")
    target = meta.get("workload.validation_target_value")
    if metric is None or target is None:
        holes.append("no target in the meta data")
    evaluations = _read_evaluations(path / "eval_measurements.csv", metric, holes)
    hit = next((e for e in evaluations if target is not None and e.value >= target), None)
    return Trial(
        path=path,
        source="embedded" if record is not None else "algoperf",
        label=path.parents[2].name,
        study=path.parents[1].name,
        workload=workload,
        framework=framework,
        trial=int(path.name.removeprefix("trial_")),
        seed=meta.get("rng_seed"),
        metric=metric,
        target=target,
        step_hint=meta.get("workload.step_hint"),
        hparams=_read_json(path / "hparams.json", holes, "hparams.json"),
        evaluations=evaluations,
        outcome=_outcome(path, hit, evaluations, record, meta, holes),
        holes=holes,
        steps_to_target=hit.step if hit else None,
        time_to_target=hit.submission_time if hit else None,
    )


def size_of(workload: str) -> str:
    """ "mini", "minidata" or "full", by the ending of a workload's name."""
    return {MINI: "mini", MINIDATA: "minidata"}.get(workload[workload.rfind("_") :], "full")


def benchmark_version(
    workload: str, step_hint: int | None, target: float | None, config_dir: Path
) -> str:
    """The AlgoPerf version whose settings a run logged, "v0.6" say, or "unknown".

    Runs on small data have targets of their own and are "mini" or "minidata".

    Versions are told apart by ``step_hint`` and validation target, which
    ``workloads_config/<workload>.json`` lists for each.
    """
    if size_of(workload) != "full":
        return size_of(workload)
    path = config_dir / f"{workload}.json"
    if path.is_file():
        versions = json.loads(path.read_text(encoding="utf-8"))["full"]["versions"]
        for name, settings in versions.items():
            same_target = target is not None and math.isclose(
                settings["validation_target_value"], target, rel_tol=1e-6
            )
            if settings["step_hint"] == step_hint and same_target:
                return str(name)
    return "unknown"


def _outcome(
    path: Path,
    hit: Evaluation | None,
    evaluations: list[Evaluation],
    record: dict[str, Any] | None,
    meta: dict[str, Any],
    holes: list[str],
) -> str:
    if record is not None and record.get("status") != "finished":
        return "unfinished"
    if hit is not None:
        return "hit"
    if not evaluations or any(hole.startswith("no target") for hole in holes):
        return "unknown"
    if record is not None or _ran_to_its_end(path, evaluations, meta):
        return "miss"
    last, budget = evaluations[-1], meta.get("workload.max_allowed_runtime_sec")
    many = f"{len(evaluations)} evaluations" if len(evaluations) > 1 else "one evaluation only"
    holes.append(
        f"{many}: the log breaks off at step {last.step}, {last.submission_time:.0f} s of a "
        f"budget of {budget} s, short of the target"
    )
    return "unknown"


def _ran_to_its_end(path: Path, evaluations: list[Evaluation], meta: dict[str, Any]) -> bool:
    """Whether an AlgoPerf log shows that its run spent its budget, of steps or of time.

    AlgoPerf leaves out the evaluation at which it finds the time spent, so a whole log ends within
    one evaluation period of the budget; some versions also log a last row with the score alone.
    """
    last = evaluations[-1]
    flags = _read_json(max(path.glob("flags_*.json"), key=_natural, default=None), [], None) or {}
    if flags.get("max_global_steps") == last.step:
        return True
    measurements = path / "measurements.csv"
    if measurements.is_file():
        with open(measurements, newline="") as file:
            rows = list(csv.DictReader(file))
        names = ("score", "accumulated_submission_time")
        score, spent = (_float(rows[-1].get(name)) if rows else math.nan for name in names)
        if not math.isnan(score) and math.isnan(spent):
            return True
    times = [evaluation.submission_time for evaluation in evaluations]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    budget = meta.get("workload.max_allowed_runtime_sec", math.inf)
    return bool(gaps) and budget - times[-1] < 1.1 * max(gaps)


def _read_evaluations(path: Path, metric: str | None, holes: list[str]) -> list[Evaluation]:
    if not path.is_file():
        holes.append("no eval_measurements.csv")
        return []
    column = f"validation/{metric}"
    needed = ("global_step", "accumulated_submission_time", column)
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        names = reader.fieldnames or []
        missing = [name for name in needed if name not in names]
        if missing:
            holes.append(f"no column {', '.join(missing)} in eval_measurements.csv")
            return []
        rows = list(reader)
    by_step: dict[int, Evaluation] = {}
    for number, row in enumerate(rows, start=2):
        values = {key: _float(value) for key, value in row.items() if isinstance(key, str)}
        step, spent, value = (values[name] for name in needed)
        if math.isnan(step) or math.isnan(spent):
            holes.append(f"eval_measurements.csv line {number} is incomplete: left out")
            continue
        if math.isnan(value):
            holes.append(f"no {column} at step {int(step)}")
        if int(step) in by_step:
            holes.append(f"step {int(step)} is there twice (a resumed run): the later row counts")
        # A resumed run goes back: rows after the step it went back to are of a lost branch.
        lost = [s for s in by_step if s > int(step)]
        if lost:
            holes.append(
                f"{len(lost)} rows after step {int(step)} were done again by a resumed run: "
                "the later rows count"
            )
        for s in (*lost, int(step)):
            by_step.pop(s, None)
        by_step[int(step)] = Evaluation(int(step), spent, value, values)
    return list(by_step.values())


def _read_json(path: Path | None, holes: list[str], name: str | None) -> dict[str, Any] | None:
    """The object in a file; a hole if it is missing (and ``name`` is given) or broken."""
    if path is None or not path.is_file():
        if name:
            holes.append(f"no {name}")
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        holes.append(f"{path.name} is not valid JSON")
        return None
    return content if isinstance(content, dict) else None


def _first(path: Path, pattern: str) -> Path | None:
    return min(path.glob(pattern), key=_natural, default=None)


def _natural(path: Path) -> list[Any]:
    parts = re.split(r"(\d+)", path.as_posix())
    return [int(part) if part.isdigit() else part for part in parts]


def _float(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan
