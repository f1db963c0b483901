"""AlgoPerf's versions as named settings: ``workloads_config/versions/<version>.json``.

A version is what a run's numbers depend on beside the submission: per workload the time budget,
evaluation period, targets and step hint; the GPUs; the precision of matrix products; and by how
much the budget of self-tuning submissions is longer. The values are those that published logs have
in their meta data (of 2026, for the five workloads without logs here, those of its scoring code
and announcements).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo import json_input
from algoperf_shampoo.errors import UserError

NAMES = ("v0.5", "v0.6", "2026")
DEFAULT = "v0.6"
UNKNOWN = "unknown"
_INSTALLED = Path(__file__).resolve().parent / "workloads_config"  # of a package not editable
CONFIG_DIR = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / _INSTALLED.name

_SETTINGS: dict[str, type] = {
    "target_metric_name": str,
    "step_hint": int,
    "max_allowed_runtime_sec": float,
    "eval_period_time_sec": float,
    "validation_target_value": float,
    "test_target_value": float,
}
_MAY_BE_NULL = ("test_target_value",)


@dataclass(frozen=True)
class Settings:
    """A workload in one version; times in seconds. Language models have no test target."""

    target_metric_name: str
    step_hint: int
    max_allowed_runtime_sec: float
    eval_period_time_sec: float
    validation_target_value: float
    test_target_value: float | None


@dataclass(frozen=True)
class Version:
    """One version. ``algoperf_commits``: those that its published runs were made with."""

    name: str
    algoperf_commits: tuple[str, ...]
    gpu: str
    gpu_count: int
    matmul_precision: str
    self_tuning_budget_factor: float
    base_workloads: tuple[str, ...]
    held_out_workloads: tuple[str, ...]
    workloads: Mapping[str, Settings]

    def budget(self, workload: str, ruleset: str) -> float:
        """Seconds of submission time that a run may take under a tuning ruleset."""
        factor = self.self_tuning_budget_factor if ruleset == "self" else 1.0
        return factor * self.workloads[workload].max_allowed_runtime_sec


def read(name: str, config_dir: Path | None = None) -> Version:
    """A version by its name.

    Raises:
        UserError: no such version, or a mistake in its file: the file, the key and the value.
    """
    path = (config_dir or CONFIG_DIR) / "versions" / f"{name}.json"
    if name not in NAMES:
        raise UserError(f"AlgoPerf version {name!r}: there is {', '.join(NAMES)}")
    found = json_input.read(path, "version file")
    kinds: dict[str, type] = {
        "version": str,
        "algoperf_commits": list,
        "gpus": dict,
        "matmul_precision": str,
        "self_tuning_budget_factor": float,
        "base_workloads": list,
        "held_out_workloads": list,
        "workloads": dict,
    }
    checked = _check(path, "", found, kinds)
    gpus = _check(path, "gpus.", checked["gpus"], {"name": str, "count": int})
    workloads = {}
    for workload, settings in checked["workloads"].items():
        where = f"workloads.{workload}."
        workloads[workload] = Settings(**_check(path, where, settings, _SETTINGS))
    for key in ("base_workloads", "held_out_workloads"):
        for workload in checked[key]:
            if workload not in workloads:
                raise UserError(f"{path}: {key} names {workload!r}, which workloads lacks")
    if checked["version"] != name:
        raise UserError(f"{path}: version is {checked['version']!r}; it must be {name!r}")
    return Version(
        name=name,
        algoperf_commits=tuple(checked["algoperf_commits"]),
        gpu=gpus["name"],
        gpu_count=gpus["count"],
        matmul_precision=checked["matmul_precision"],
        self_tuning_budget_factor=checked["self_tuning_budget_factor"],
        base_workloads=tuple(checked["base_workloads"]),
        held_out_workloads=tuple(checked["held_out_workloads"]),
        workloads=workloads,
    )


@functools.cache
def shipped() -> tuple[Version, ...]:
    """All versions, as they ship."""
    return tuple(read(name) for name in NAMES)


def identify(
    workload: str,
    step_hint: float | None,
    target: float | None,
    budget: float | None,
    commit: Any = None,
) -> str:
    """The version whose settings a run logged, "unknown" if it is none.

    Where the settings of several versions are the same (criteo1tb in v0.5 and v0.6), the commit of
    AlgoPerf decides, if the run logged a known one; else all are named: "v0.5 or v0.6".
    """
    if target is None or budget is None:
        return UNKNOWN
    fitting = []
    for version in shipped():
        settings = version.workloads.get(workload)
        if (
            settings is not None
            and settings.step_hint == step_hint
            and math.isclose(settings.validation_target_value, target, rel_tol=1e-6)
            and math.isclose(settings.max_allowed_runtime_sec, budget, rel_tol=1e-6)
        ):
            fitting.append(version)
    by_commit = [version for version in fitting if commit in version.algoperf_commits]
    return " or ".join(version.name for version in (by_commit or fitting)) or UNKNOWN


def knows(workload: str) -> bool:
    """Whether a version has settings for a workload."""
    return any(workload in version.workloads for version in shipped())


def metrics_of(workload: str) -> list[str]:
    """The metrics that a workload's target has in some version; none of an unknown workload."""
    settings = [version.workloads.get(workload) for version in shipped()]
    return list(dict.fromkeys(one.target_metric_name for one in settings if one is not None))


def self_tuning_factor(version: str) -> float:
    """How much longer self-tuning runs may take; of an unknown version, the most it ever was."""
    named = [v.self_tuning_budget_factor for v in shipped() if v.name in version.split(" or ")]
    return max(named or [v.self_tuning_budget_factor for v in shipped()])


def _check(path: Path, where: str, found: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """An object with just these keys, of these types; whole numbers do for floats."""
    if not isinstance(found, dict):
        what = where.removesuffix(".") or "the file"
        raise UserError(f"{path}: {what} is {found!r}; it must be an object")
    odd = sorted(set(found) ^ set(kinds))
    if odd:
        fault = "unknown" if odd[0] in found else "missing"
        raise UserError(f"{path}: key {where}{odd[0]} is {fault}; right are {', '.join(kinds)}")
    checked: dict[str, Any] = {}
    for key, kind in kinds.items():
        value = found[key]
        if value is None and key in _MAY_BE_NULL:
            checked[key] = None
            continue
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        positive = kind not in (int, float) or (isinstance(value, int | float) and value > 0)
        if not isinstance(value, kind) or isinstance(value, bool) or not positive:
            names = {str: "a string", int: "a whole number above 0", float: "a number above 0"}
            wanted = names.get(kind, "a list" if kind is list else "an object")
            raise UserError(f"{path}: {where}{key} is {value!r}; it must be {wanted}")
        checked[key] = value
    return checked
