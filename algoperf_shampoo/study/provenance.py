"""Whether a run lies where its files say it belongs, and by what it is known.

A run's folder is LABEL/study_SEED/WORKLOAD_FRAMEWORK/trial_N, and its record says the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from algoperf_shampoo.harness import seal
from algoperf_shampoo.study import files
from algoperf_shampoo.study.evaluations import EVALS, Holes

NONE = "none"
"""In the place of a term that a run does not state."""
LAUNCHES = "launches.json"
_SUBMISSION = re.compile(r"submissions/([^/]+)/submission\.py")
_SHOWN = 12  # digits of a sha256


def check_place(
    identity: dict[str, Any],
    study: Path,
    workload: str,
    framework: str,
    trial: str,
    holes: Holes,
) -> None:
    """Faults where a record's identity is not that of the folders which it lies in.

    A variant must begin the label. Records without a label, say, are not held to one.
    """
    here = {
        "label": study.parent.name,
        "seed": study.name.removeprefix("study_"),
        "workload": workload,
        "framework": framework,
        "trial": trial.removeprefix("trial_"),
    }
    # The embedded harness is PyTorch's, and its records need not say so.
    said = {"framework": "pytorch", "workload": None, **identity}
    for key, found in here.items():
        value = said.get(key)
        if key in said and (isinstance(value, bool) or str(value) != found):
            holes.fault(
                f"run.json: {key} is {_short(value)}; the folder's name: {_short(found)}: "
                f"it holds a run of {_short(value)}"
            )
    label, own = identity.get("label"), identity.get("variant")
    if own is not None and label is not None and not _begins(label, own):
        holes.fault(f"run.json: variant is {_short(own)}; the label: {_short(label)}")


def check_seed(study: Path, seed: Any, holes: Holes) -> None:
    """A fault where a run of ours under AlgoPerf's harness is not in the folder of its seed."""
    number = study.name.removeprefix("study_")
    if seed is not None and str(seed) != number:
        holes.fault(
            f"meta_data_0.json: rng_seed is {_short(seed)}; the folder's name: {_short(study.name)}"
        )


def check_flags(
    flags: dict[str, Any], study: Path, workload: str, framework: str, ours: bool, holes: Holes
) -> None:
    """Faults where the flags of AlgoPerf's runner are not those of the folders a log lies in.

    Published logs are held to workload and framework, as their labels and studies are named anew
    when they are published. ``ours``: made by our launcher, which names the other folders too.
    """
    said: dict[str, Any] = {"workload": flags.get("workload"), "framework": flags.get("framework")}
    here = {"workload": workload, "framework": framework}
    if ours:
        said |= {"experiment_name": flags.get("experiment_name")}
        here |= {"experiment_name": study.name}
        folder = flags.get("experiment_dir")
        if isinstance(folder, str):
            said["experiment_dir"] = PurePosixPath(folder).name
            here["experiment_dir"] = study.parent.name
    for key, value in said.items():
        if isinstance(value, str) and value != here[key]:
            holes.fault(
                f"flags_*.json: {key} is {_short(value)}; the folder's name: {_short(here[key])}"
            )
    path = flags.get("submission_path")
    of = _SUBMISSION.fullmatch(path) if ours and isinstance(path, str) else None
    if of and not _begins(study.parent.name, of[1]):
        label = _short(study.parent.name)
        holes.fault(f"flags_*.json: submission_path is {_short(path)}; the label: {label}")


def made_by(path: Path, names: list[str], record: dict[str, Any] | None) -> dict[str, str]:
    """Sources, software and machine that a run of ours was made with, as far as it says.

    Of a run in several sessions every value that there was, in their order.
    """
    found: dict[str, dict[str, None]] = {}
    for what, value in _made_by(path, names, record):
        if value is not None:
            found.setdefault(what, {})[files.printable(str(value), 80)] = None
    return {what: ", then ".join(values) for what, values in found.items()}


def _made_by(
    path: Path, names: list[str], record: dict[str, Any] | None
) -> Iterator[tuple[str, Any]]:
    if record is None:
        for launch in _launches(path) if LAUNCHES in names else []:
            for key in ("torch", "algoperf_commit"):
                yield key, launch.get(key)
            gpus = launch.get("gpus")
            yield "GPUs", _several(gpus) if isinstance(gpus, list) else None
        return
    identity = record.get("identity")
    sources = identity.get("source_sha256") if isinstance(identity, dict) else None
    for key in ("submission", "optimizer", "workloads"):
        digest = sources.get(key) if isinstance(sources, dict) else None
        yield f"{key} source", digest[:_SHOWN] if isinstance(digest, str) else None
    sessions = record.get("sessions")
    for session in sessions if isinstance(sessions, list) else []:
        if not isinstance(session, dict):
            continue
        packages, count = session.get("packages"), session.get("gpu_count")
        yield "torch", packages.get("torch") if isinstance(packages, dict) else None
        gpu = session.get("gpu_model_name")
        if count and gpu:
            yield "GPUs", f"{count} x {gpu}"
        else:
            yield "CPU", session.get("cpu_model_name")


def _launches(path: Path) -> list[dict[str, Any]]:
    try:
        found = files.read_json_value(path / LAUNCHES)
    except files.Unreadable:
        return []  # no part of what was measured
    return [launch for launch in found if isinstance(launch, dict)] if type(found) is list else []


def _several(values: list[Any]) -> str:
    names = [str(value) for value in values]
    same = len(set(names)) == 1
    return f"{len(names)} x {names[0]}" if same else ", ".join(names) or NONE


def variant(identity: dict[str, Any]) -> str | None:
    """The variant that a record names."""
    value = identity.get("variant")
    return value if isinstance(value, str) else None


def terms(
    metric: str | None,
    target: float | None,
    meta: dict[str, Any],
    flags: dict[str, Any],
    identity: dict[str, Any],
) -> tuple[str, ...]:
    """Metric and target, most steps, most seconds, and the digest of the data; "none" unknown."""
    properties, config = identity.get("workload_properties"), identity.get("workload_config")
    steps = properties.get("max_steps") if isinstance(properties, dict) else None
    if not identity:
        steps = flags.get("max_global_steps")
    data = config.get("data") if isinstance(config, dict) else None
    digest = data.get("sha256") if isinstance(data, dict) else None
    seconds = files.finite(meta.get("workload.max_allowed_runtime_sec"))
    return (
        NONE if target is None else f"{metric} {target!r}",
        _number(files.finite(steps)),
        _number(seconds),
        digest if isinstance(digest, str) and digest.isalnum() else NONE,
    )


def stamps(path: Path, names: list[str], record: dict[str, Any] | None) -> tuple[str, ...]:
    """Digests of evaluations, of the record, and of seed and trained parameters, as far as known.

    Two runs that share one are one run: submission times are measured to the nanosecond.
    """
    found = []
    if EVALS in names:
        try:
            text = files.read_text(path / EVALS, files.MAX_CSV_BYTES)
            found.append(f"evaluations {hashlib.sha256(text.encode()).hexdigest()}")
        except files.Unreadable:
            pass  # a fault of the log, which is said where it is read
    if record is None:
        return tuple(found)
    found.append(f"record {seal.digest(record)}")
    result, identity = record.get("result"), record.get("identity")
    params = result.get("params_sha256") if isinstance(result, dict) else None
    if isinstance(params, str) and isinstance(identity, dict):
        found.append(f"parameters {_short(identity.get('seed'))} {params}")
    return tuple(found)


def _begins(label: Any, own: Any) -> bool:
    both = isinstance(label, str) and isinstance(own, str)
    return both and (label == own or label.startswith(f"{own}_"))


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"


def _short(value: Any) -> str:
    return files.printable(json.dumps(value), 60)
