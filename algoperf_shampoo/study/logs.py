"""One reader for run folders in AlgoPerf's layout, whoever wrote them.

It takes embedded runs, runs of the real harness and the published logs alike, told apart by what
lies in the folder. The target is the one the run itself logged; a hit is the first evaluation whose
validation metric reaches it, and its time is that row's ``accumulated_submission_time``. What a log
lacks is listed in :attr:`Trial.holes`; nothing is filled in. No content of any file is an error
here: it is a hole of its own run, which is then not counted, and the others are read all the same.

A run of ours has a record (``run.json``, or ``seal.json`` beside AlgoPerf's files) with sizes and
digests of the others. Where files, record and digests disagree the run is not counted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from algoperf_shampoo import versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import seal
from algoperf_shampoo.harness.spec import MINI, MINIDATA, STOP_AT_TARGET
from algoperf_shampoo.study import files, pooling, provenance
from algoperf_shampoo.study.evaluations import (
    EVALS,
    METRICS,
    Evaluation,
    Holes,
    read_evaluations,
    spent_with_score,
)
from algoperf_shampoo.study.trial import Trial as Trial

FRAMEWORKS = ("pytorch", "jax")
_RECORD, _LOSSES = "run.json", "step_losses.csv"
_DIVERGED = "diverged"
ALL_STEPS = "all steps"
_TRIAL = re.compile(r"trial_[0-9]+")
_STUDY = re.compile(r"study_[0-9]+")
_MAX_TEXT = 1000
"""Length of a hyperparameter that is a text; longer ones are no hyperparameters."""


def find_trials(
    roots: Iterable[Path], say: Callable[[str], None] = lambda note: None
) -> list[Trial]:
    """Every trial below ``roots``, in the order of their paths; links are followed.

    Each folder is entered once, however many links lead to it, and by its own path if that lies
    below ``roots``; a run that lies there twice counts once (:func:`.pooling.once`). ``say`` is
    given a line for each folder or link that is left out.

    Raises:
        UserError: a root does not exist.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    left: list[Path] = []
    links: list[Path] = []
    for root in roots:
        if not _is_dir(root):
            raise UserError(f"{root}: no such folder of runs")
        left.append(root.absolute())
    while left or links:
        path = left.pop() if left else links.pop()
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in entered:
                if path.is_symlink():
                    say(f"{files.printable(str(path))}: a link to a folder that is read already")
                continue
            entered.add((status.st_dev, status.st_ino))
            if is_trial(path):
                found.append(path)
                continue
            names = os.listdir(path)
        except OSError as error:
            say(f"{files.printable(str(path))}: left out: {error.strerror}")
            continue
        below = [path / name for name in names if _is_dir(path / name)]
        left += [p for p in below if not p.is_symlink()]
        links = sorted([*links, *(p for p in below if p.is_symlink())], key=_natural, reverse=True)
    return pooling.once([read_trial(path) for path in sorted(found, key=_natural)])


def is_trial(path: Path) -> bool:
    """Whether a path is a folder LABEL/study_K/WORKLOAD_FRAMEWORK/trial_N.

    Some published logs lack the level of the workload: with AlgoPerf's files in them,
    LABEL/study_K/trial_N are trials too.
    """
    if not _TRIAL.fullmatch(path.name) or not _is_dir(path):
        return False
    if path.parent.name.endswith(tuple(f"_{name}" for name in FRAMEWORKS)):
        return True
    return bool(_STUDY.fullmatch(path.parent.name)) and (path / EVALS).exists()


def read_trial(path: Path) -> Trial:
    """Read one trial folder.

    Raises:
        UserError: the folder is not LABEL/study_K/WORKLOAD_FRAMEWORK/trial_N.
    """
    path = path.absolute()
    if not is_trial(path):
        raise UserError(f"{path}: not a folder study_K/WORKLOAD_pytorch/trial_N of a run")
    holes = Holes()
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        holes.fault(f"the folder cannot be read: {error.strerror}")
        names = []
    meta = _read_meta(path, names, holes)
    flags = _newest(path, names, "flags_", holes)
    study, workload, framework = _place(path, flags, holes)
    record = _read_object(path / _RECORD, holes) if _RECORD in names else None
    if _RECORD not in names and (_LOSSES in names or size_of(workload) == "mini"):
        what = _LOSSES if _LOSSES in names else f"the workload {files.printable(workload, 80)}"
        holes.fault(f"no {_RECORD}, though {what} is of the embedded harness")
    _check_seal(path, names, record, holes)
    hparams = _read_hparams(path, names, flags, holes)
    metric, target = _target(meta, holes)
    if metric is not None and metric not in (known := versions.metrics_of(workload) or [metric]):
        holes.fault(f"the metric in the meta data is {metric}; that of {workload}: {known[0]}")
    evaluations = read_evaluations(path, metric, holes) if metric is not None else []
    hit = None
    if metric is not None and target is not None:
        reaches = METRICS[metric].reaches
        hit = next((e for e in evaluations if reaches(e.value, target)), None)
    embedded = _RECORD in names
    if record is not None:
        _check_record(record, meta, hparams, hit, evaluations, holes)
        provenance.check_place(_identity(record), study, workload, framework, path.name, holes)
    else:
        ours = seal.NAME in names
        provenance.check_flags(flags, study, workload, framework, ours, holes)
        if ours:
            provenance.check_seed(study, meta.get("rng_seed"), holes)
    status = record.get("status") if record is not None else None
    diverged = status == _DIVERGED or _is_not_finite(evaluations)
    if diverged:
        holes.note("diverged" + (" (run.json)" if status == _DIVERGED else ""))
    version = _version(workload, meta, target)
    if version == versions.UNKNOWN and versions.knows(workload):
        holes.note("step hint, target and budget of the meta data are of no known AlgoPerf version")
    ruleset = "self" if flags.get("tuning_ruleset") == "self" else "external"
    budget = _budget(meta, version, ruleset)
    to_target = record is None or _identity(record).get(STOP_AT_TARGET) is not False
    if hit is not None and to_target:
        _check_limits(hit, budget, version, flags, holes)
    outcome = _outcome(path, hit, evaluations, embedded, status, diverged, flags, budget, holes)
    if not to_target and outcome in ("hit", "miss"):
        outcome = ALL_STEPS
    if outcome != "hit":
        hit = None
    label = files.printable(study.parent.name)
    if not label.isascii():  # some letters look like others
        holes.note(f"the label is {ascii(label)}")
    return Trial(
        path=path,
        source="embedded" if embedded else "algoperf",
        label=label,
        study=files.printable(study.name),
        workload=files.printable(workload),
        framework=framework,
        trial=int(path.name.removeprefix("trial_")),
        seed=_whole(meta.get("rng_seed")),
        metric=metric,
        target=target,
        step_hint=_whole(meta.get("workload.step_hint")),
        hparams=hparams,
        evaluations=evaluations,
        outcome=outcome,
        holes=[files.printable(text, 600) for text in holes.texts],
        steps_to_target=hit.step if hit else None,
        time_to_target=hit.submission_time if hit else None,
        diverged=diverged,
        version=version,
        ruleset=ruleset,
        to_target=to_target,
        variant=provenance.variant(_identity(record or {})),
        terms=provenance.terms(metric, target, meta, flags, _identity(record or {})),
        stamps=provenance.stamps(path, names, record),
        recorded=embedded or seal.NAME in names,
        made_by=provenance.made_by(path, names, record),
    )


def size_of(workload: str) -> str:
    """ "mini", "minidata" or "full", by the ending of a workload's name."""
    return {MINI: "mini", MINIDATA: "minidata"}.get(workload[workload.rfind("_") :], "full")


def _version(workload: str, meta: dict[str, Any], target: float | None) -> str:
    """The AlgoPerf version of a run; "mini" and "minidata", which have targets of their own."""
    if size_of(workload) != "full":
        return size_of(workload)
    return versions.identify(
        workload,
        files.finite(meta.get("workload.step_hint")),
        target,
        files.finite(meta.get("workload.max_allowed_runtime_sec")),
        meta.get("git_commit_hash"),
    )


def _place(path: Path, flags: dict[str, Any], holes: Holes) -> tuple[Path, str, str]:
    """Folder of the study, workload, and framework of a trial."""
    workload, _, framework = path.parent.name.rpartition("_")
    if framework in FRAMEWORKS:
        return path.parents[1], workload, framework
    named, by = flags.get("workload"), flags.get("framework")
    if isinstance(named, str) and by in FRAMEWORKS:
        return path.parent, named, str(by)
    holes.fault("neither the folder above nor flags_*.json names a workload and a framework")
    return path.parent, "unknown", "unknown"


def _read_object(path: Path, holes: Holes) -> dict[str, Any] | None:
    """The object in a JSON file that is there; None and a fault if it cannot be had."""
    try:
        return files.read_json(path)
    except files.Unreadable as reason:
        holes.fault(f"{path.name} {reason}")
        return None


def _read_meta(path: Path, names: list[str], holes: Holes) -> dict[str, Any]:
    """The first session's meta data; a fault where a later session had another target."""
    own = files.numbered(names, "meta_data_")
    if not own:
        holes.fault("no meta_data_0.json")
        return {}
    read = [(name, _read_object(path / name, holes)) for name in own]
    first = read[0][1] or {}
    for name, other in read[1:]:
        for key in ("target_metric_name", "validation_target_value", "max_allowed_runtime_sec"):
            key = f"workload.{key}"
            if other is not None and other.get(key) != first.get(key):
                was, now = (_short(one.get(key)) for one in (first, other))
                holes.fault(f"{key} is {was} in {own[0]} and {now} in {name}")
    return first


def _newest(path: Path, names: list[str], start: str, holes: Holes) -> dict[str, Any]:
    found = files.numbered(names, start)
    return (_read_object(path / found[-1], holes) if found else None) or {}


def _target(meta: dict[str, Any], holes: Holes) -> tuple[str | None, float | None]:
    metric = meta.get("workload.target_metric_name")
    stated = meta.get("workload.validation_target_value")
    if metric is None or stated is None:
        holes.fault("no target in the meta data")
        return None, None
    target = files.finite(stated)
    if target is None:
        holes.fault(f"the target in the meta data is {_short(stated)}, not a finite number")
    if not isinstance(metric, str) or metric not in METRICS:
        known = ", ".join(METRICS)
        holes.fault(f"the metric in the meta data is {_short(metric)}; known are {known}")
        return None, target
    return metric, target


def _read_hparams(
    path: Path, names: list[str], flags: dict[str, Any], holes: Holes
) -> dict[str, Any] | None:
    if "hparams.json" not in names:
        if flags.get("tuning_ruleset") != "self":  # which has no point
            holes.note("no hparams.json")
        return None
    hparams = _read_object(path / "hparams.json", holes)
    for key, value in (hparams or {}).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and files.finite(value) is None:
            holes.fault(f"hparams.json: {files.printable(key, 80)} is {value}, not a finite number")
            return None
        if isinstance(value, dict | list):
            holes.fault(f"hparams.json: {files.printable(key, 80)} is {_short(value)}, no value")
            return None
        for text in (key, value):
            if isinstance(text, str) and files.printable(text, _MAX_TEXT) != text:
                holes.fault(f"hparams.json: {files.printable(key, 80)}: no text of a point")
                return None
    return hparams


def _check_seal(path: Path, names: list[str], record: dict[str, Any] | None, holes: Holes) -> None:
    """Faults where files are not as the record has them."""
    ended = True
    if record is not None:
        ended = record.get("status") in ("finished", _DIVERGED)
    elif seal.NAME in names:
        record = _read_object(path / seal.NAME, holes)
    if record is None:
        return
    try:
        for problem in seal.problems(path, record, ended):
            holes.fault(problem)
    except OSError as error:
        holes.fault(f"files cannot be compared with their digests: {error.strerror}")


def _check_record(
    record: dict[str, Any],
    meta: dict[str, Any],
    hparams: dict[str, Any] | None,
    hit: Evaluation | None,
    evaluations: list[Evaluation],
    holes: Holes,
) -> None:
    """Faults where ``run.json`` says something else than the files beside it."""

    def compare(what: str, said: Any, where: str, found: Any) -> None:
        if said != found:
            holes.fault(f"run.json: {what} is {_short(said)}; {where}: {_short(found)}")

    identity = _part(record, "identity", holes)
    if identity is None:
        return
    properties = _part(identity, "workload_properties", holes) or {}
    compare("seed", identity.get("seed"), "meta_data_0.json", meta.get("rng_seed"))
    for key in ("target_metric_name", "validation_target_value"):
        compare(key, properties.get(key), "meta_data_0.json", meta.get(f"workload.{key}"))
    compare("hparams", identity.get("hparams"), "hparams.json", hparams)
    if record.get("status") not in ("finished", _DIVERGED):
        return
    result = _part(record, "result", holes)
    if result is None or holes.faults:
        return
    where = EVALS
    compare("steps_to_target", result.get("steps_to_target"), where, hit.step if hit else None)
    spent = hit.submission_time if hit else None
    compare("time_to_target", result.get("time_to_target"), where, spent)
    last, end = evaluations[-1].step if evaluations else 0, files.finite(result.get("global_step"))
    if end is None or end < last:
        compare("global_step", result.get("global_step"), f"last step in {where}", last)


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """What a record says of the run it is of; {} if it does not, which is a fault elsewhere."""
    identity = record.get("identity")
    return identity if isinstance(identity, dict) else {}


def _part(record: dict[str, Any], key: str, holes: Holes) -> dict[str, Any] | None:
    value = record.get(key)
    if isinstance(value, dict):
        return value
    holes.fault(f"run.json: {key} is {_short(value)}, not an object")
    return None


def _is_not_finite(evaluations: list[Evaluation]) -> bool:
    return bool(evaluations) and not math.isfinite(evaluations[-1].value)


def _outcome(
    path: Path,
    hit: Evaluation | None,
    evaluations: list[Evaluation],
    embedded: bool,
    status: Any,
    diverged: bool,
    flags: dict[str, Any],
    budget: float | str,
    holes: Holes,
) -> str:
    ended = status in ("finished", _DIVERGED)
    if embedded and not ended and not holes.faults:
        return "unfinished"
    if holes.faults:
        return "unknown"
    if hit is not None:
        return "hit"
    if embedded or diverged:
        return "miss"
    if isinstance(budget, str):
        holes.fault(budget)
        return "unknown"
    if _ran_to_its_end(path, evaluations, flags, budget):
        return "miss"
    last = evaluations[-1]
    many = f"{len(evaluations)} evaluations" if len(evaluations) > 1 else "one evaluation only"
    holes.fault(
        f"{many}: the log breaks off at step {last.step}, {last.submission_time:.0f} s of a "
        f"budget of {budget:g} s, short of the target"
    )
    return "unknown"


def _check_limits(
    hit: Evaluation, budget: float | str, version: str, flags: dict[str, Any], holes: Holes
) -> None:
    """Faults where a target was reached after a budget was spent: no harness evaluates then."""
    if isinstance(budget, float) and not flags:  # so that nothing says by which ruleset
        budget *= versions.self_tuning_factor(version)
    if isinstance(budget, float) and hit.submission_time > budget:
        holes.fault(
            f"the target is reached after {hit.submission_time:.0f} s, and the budget is {budget:g}"
        )
    limit = files.finite(flags.get("max_global_steps"))
    if limit is not None and hit.step > limit:
        holes.fault(f"the target is reached at step {hit.step}, and max_global_steps is {limit:g}")


def _budget(meta: dict[str, Any], version: str, ruleset: str) -> float | str:
    """Seconds of submission time that the run was allowed, or what is wrong with them."""
    stated = meta.get("workload.max_allowed_runtime_sec")
    budget = files.finite(stated)
    if budget is None or budget <= 0:
        return f"the time budget in the meta data is {_short(stated)}, not a number above 0"
    return budget * (versions.self_tuning_factor(version) if ruleset == "self" else 1.0)


def _ran_to_its_end(
    path: Path, evaluations: list[Evaluation], flags: dict[str, Any], budget: float
) -> bool:
    """Whether an AlgoPerf log shows that its run spent its budget, of steps or of time.

    AlgoPerf leaves out the evaluation at which it finds the time spent, so a whole log ends within
    one evaluation period of the budget; some versions also log a last row with the score alone.
    """
    last = evaluations[-1]
    if flags.get("max_global_steps") == last.step or spent_with_score(path):
        return True
    times = [evaluation.submission_time for evaluation in evaluations]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    return bool(gaps) and budget - times[-1] < 1.1 * max(gaps)


def _whole(value: Any) -> int | None:
    number = files.finite(value)
    return int(number) if number is not None and number == int(number) else None


def _short(value: Any) -> str:
    """A value of a JSON file for a message."""
    return files.printable(json.dumps(value), 60)


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or with a null character
        return False


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A key that orders numbers in a path by their value."""
    parts = re.split(r"([0-9]+)", path.as_posix())
    return [
        (1, int(part), "") if part.isdecimal() and part.isascii() else (0, 0, part)
        for part in parts
    ]
