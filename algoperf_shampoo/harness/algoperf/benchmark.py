"""Another version's numbers in AlgoPerf's runner: ``VERSION=2026`` under the code of 2c90454f.

A version of the benchmark is budgets, evaluation periods, targets, step hints, the factor of
self-tuning budgets and the precision of products (:mod:`algoperf_shampoo.versions`). They are put
into the process that runs; nothing of AlgoPerf is edited. Its meta data then name the version's own
numbers, by which a log reader tells the version.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from algoperf_shampoo import versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.algoperf import minidata

VARIABLE = "SHAMPOO_ALGOPERF_VERSION"
"""Environment variable by which the launcher tells :mod:`.runner` the version."""
BUDGET = "max_allowed_runtime_sec"
_PRECISIONS = {"float32": "highest", "tf32": "high"}  # as torch calls them
# The runner's own factor: "else 1.5 * workload.max_allowed_runtime_sec".
_FACTOR = re.compile(r"([\d.]+) \* workload\.max_allowed_runtime_sec")


def asked() -> str | None:
    """The version that the environment names, None for the runner's own numbers."""
    return os.environ.get(VARIABLE) or None


def properties(version: str, workload: str) -> dict[str, Any]:
    """What the version says of a workload, by the names of AlgoPerf's properties.

    Raises:
        UserError: no such version, or the workload is not in it.
    """
    found = versions.read(version).workloads.get(minidata.base_name(workload))
    if found is None:
        raise UserError(f"VERSION={version}: it has no workload {minidata.base_name(workload)}")
    said = dataclasses.asdict(found)
    return {k: v for k, v in said.items() if k != "target_metric_name" and v is not None}


def own_factor(runner: ModuleType) -> float:
    """By how much a runner lengthens the budget of self-tuning submissions, from its source.

    Raises:
        UserError: it says no such factor.
    """
    found = set(_FACTOR.findall(inspect.getsource(runner)))
    if len(found) != 1:
        raise UserError(
            f"{runner.__file__}: no one factor of self-tuning budgets found ({len(found)}), so "
            "VERSION= cannot be set there"
        )
    return float(found.pop())


def apply(version: str, workload: str, ruleset: str, runner: ModuleType) -> None:
    """Give the workload the version's numbers, in this process, before ``runner`` starts.

    Args:
        workload: of AlgoPerf's registry; ``ruleset``: AlgoPerf's, "external" or "self".
        runner: the imported ``submission_runner``.
    """
    import torch

    stated = properties(version, workload)
    held = dict(stated)
    if ruleset == "self":
        factor = versions.read(version).self_tuning_budget_factor / own_factor(runner)
        if factor != 1.0:
            held[BUDGET] = stated[BUDGET] * factor
    registry: Any = importlib.import_module("algoperf.workloads.workloads")
    load = registry.import_workload

    def import_workload(*arguments: Any, **options: Any) -> Any:
        made = load(*arguments, **options)
        made.__class__ = minidata.with_properties(type(made), held)
        return made

    registry.import_workload = import_workload
    if held != stated:
        _log_as(stated)
    torch.set_float32_matmul_precision(_PRECISIONS[versions.read(version).matmul_precision])


def _log_as(stated: Mapping[str, Any]) -> None:
    """Let meta data have the version's budget, not what stands in for the runner's factor."""
    loggers: Any = importlib.import_module("algoperf.logger_utils")
    collect = loggers._get_workload_properties

    def get_workload_properties(workload: Any) -> dict[str, Any]:
        return {**collect(workload), f"workload.{BUDGET}": stated[BUDGET]}

    loggers._get_workload_properties = get_workload_properties
