"""Whether what lies in a run's folder is whole, and the very run that is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from algoperf_shampoo.harness import seal
from algoperf_shampoo.harness.spec import EVAL_PERIOD, MINIDATA, STOP_AT_TARGET, RunSpec
from algoperf_shampoo.study import files
from algoperf_shampoo.study.evaluations import METRICS, Evaluation
from algoperf_shampoo.study.logs import Trial

_RECORD = "run.json"


def first_hit(trial: Trial) -> Evaluation | None:
    """The first evaluation at the target, of a run that is still going on too."""
    if trial.target is None or trial.metric not in METRICS:
        return None
    reaches, target = METRICS[trial.metric].reaches, trial.target
    return next((e for e in trial.evaluations if reaches(e.value, target)), None)


def damage(trial: Trial) -> str:
    """Why a run is not to be believed; empty if its files are as they were written.

    A log of AlgoPerf's that merely breaks off is whole.
    """
    reasons = "; ".join(trial.holes)
    if trial.source == "embedded":
        return reasons if trial.outcome == "unknown" else ""
    if trial.outcome == "unknown" and first_hit(trial) is not None:
        return reasons
    try:
        record = files.read_json(trial.path / seal.NAME)
        return "; ".join(seal.problems(trial.path, record, ended=True))
    except files.Missing:
        return ""
    except files.Unreadable as reason:
        return f"{seal.NAME} {reason}"
    except OSError as error:
        return f"files cannot be compared with their digests: {error.strerror}"


def another(run: RunSpec, trial: Trial) -> str:
    """How a run that is over is another than ``run``; empty if it is that one.

    Compared are variant, workload, seed, point, step limit and whether it stops at its target: what
    its folder's name says in part only, and what may have been copied or edited since. The sources
    are not: a study goes on after they have changed.
    """
    if trial.source == "embedded":
        pairs = _embedded(run, _identity(trial.path / _RECORD))
    else:
        pairs = _algoperf(run, trial)
    for key, there, here in pairs:
        if there != here:
            shown = f"{key} is {_short(there)} there and {_short(here)} now"
            return f"holds another run: {shown}"
    return ""


def _embedded(run: RunSpec, identity: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    pairs: list[tuple[str, Any, Any]] = [
        (key, identity.get(key, "absent"), getattr(run, key))
        for key in ("variant", "workload", "seed", "trial")
    ]
    pairs += _points(identity.get("hparams"), run)
    if run.max_steps is not None:
        properties = identity.get("workload_properties")
        limit = properties.get("max_steps") if isinstance(properties, dict) else None
        pairs.append(("max_steps", limit, run.max_steps))
    pairs.append((STOP_AT_TARGET, identity.get(STOP_AT_TARGET, True), run.stop_at_target))
    pairs.append((EVAL_PERIOD, identity.get(EVAL_PERIOD), run.eval_period))
    return pairs


def _algoperf(run: RunSpec, trial: Trial) -> list[tuple[str, Any, Any]]:
    pairs: list[tuple[str, Any, Any]] = [("tuning_ruleset", trial.ruleset, run.ruleset)]
    if trial.seed is not None:
        pairs.append(("seed", trial.seed, run.seed))
    if run.ruleset == "external" and trial.hparams is not None:
        pairs += _points(trial.hparams, run)
    # One that ended by a step limit cannot go on to a higher one, nor to none.
    flags = _newest_flags(trial.path)
    limit, last = files.finite(flags.get("max_global_steps")), trial.evaluations[-1:]
    data_decides = run.max_steps is None and run.workload.endswith(MINIDATA)
    ended = limit and last and last[0].step >= limit and trial.outcome != "hit"
    if limit and ended and not data_decides and (run.max_steps or limit + 1) > limit:
        pairs.append(("max_global_steps", int(limit), run.max_steps))
    return pairs


def _points(there: Any, run: RunSpec) -> list[tuple[str, Any, Any]]:
    here = json.loads(json.dumps(run.hparams))
    if not isinstance(there, dict):
        return [("hparams", there, here)]
    names = [*here, *(name for name in there if name not in here)]
    return [
        (f"hparams.{name}", there.get(name, "absent"), here.get(name, "absent")) for name in names
    ]


def _identity(path: Path) -> dict[str, Any]:
    try:
        identity = files.read_json(path).get("identity")
    except files.Unreadable:
        return {}
    return identity if isinstance(identity, dict) else {}


def _newest_flags(folder: Path) -> dict[str, Any]:
    names = files.numbered([path.name for path in folder.glob("flags_*.json")], "flags_")
    try:
        return files.read_json(folder / names[-1]) if names else {}
    except files.Unreadable:
        return {}


def _short(value: Any) -> str:
    return files.printable(json.dumps(value), 40)
