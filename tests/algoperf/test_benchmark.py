"""VERSION=: another version's budgets, targets, factor and precision in AlgoPerf's runner."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from algoperf_shampoo import versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.algoperf import benchmark
from algoperf_shampoo.study import logs
from algoperf_shampoo.study.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]


class Workload:
    """What AlgoPerf's FastMRI has in v0.6."""

    step_hint = property(lambda self: 18094)
    max_allowed_runtime_sec = property(lambda self: 4430)
    eval_period_time_sec = property(lambda self: 80)
    validation_target_value = property(lambda self: 0.723653)
    test_target_value = property(lambda self: 0.740633)
    num_train_examples = property(lambda self: 34742)


@pytest.fixture
def algoperf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Stand-ins for the modules of AlgoPerf that are patched; a runner whose factor is 1.5."""
    registry: Any = ModuleType("algoperf.workloads.workloads")
    registry.import_workload = lambda **options: Workload()
    loggers: Any = ModuleType("algoperf.logger_utils")
    loggers._get_workload_properties = lambda workload: {
        f"workload.{name}": getattr(workload, name)
        for name in dir(workload)
        if not name.startswith("_")
    }
    for module in (registry, loggers):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    before = torch.get_float32_matmul_precision()
    yield registry, loggers, runner(tmp_path, "else 1.5 * workload.max_allowed_runtime_sec")
    torch.set_float32_matmul_precision(before)


def runner(folder: Path, line: str) -> ModuleType:
    path = folder / "submission_runner.py"
    path.write_text(f"def train_once(workload, external):\n    return 0 if external {line}\n")
    spec = importlib.util.spec_from_file_location("submission_runner", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("version", versions.NAMES)
@pytest.mark.parametrize("ruleset", ["external", "self"])
def test_a_workload_has_the_versions_numbers(algoperf: Any, version: str, ruleset: str) -> None:
    registry, loggers, module = algoperf
    benchmark.apply(version, "fastmri", ruleset, module)
    workload = registry.import_workload()
    own = versions.read(version)
    settings = own.workloads["fastmri"]
    assert workload.step_hint == settings.step_hint
    assert workload.eval_period_time_sec == settings.eval_period_time_sec
    assert workload.validation_target_value == settings.validation_target_value
    assert workload.test_target_value == settings.test_target_value
    assert workload.num_train_examples == 34742
    # What the runner allows in the end, and what a log reader sees.
    factor = 1.5 if ruleset == "self" else 1.0
    allowed = factor * workload.max_allowed_runtime_sec
    assert math.isclose(allowed, own.budget("fastmri", ruleset))
    meta = loggers._get_workload_properties(workload)
    assert meta["workload.max_allowed_runtime_sec"] == settings.max_allowed_runtime_sec
    assert logs._version("fastmri", meta, meta["workload.validation_target_value"]) == version
    precision = "high" if version == "2026" else "highest"
    assert torch.get_float32_matmul_precision() == precision


def test_what_cannot_be_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"submission_runner.py: no one factor .* \(0\)"):
        benchmark.own_factor(runner(tmp_path, "else workload.budget"))
    with pytest.raises(UserError, match="VERSION=v0.6: it has no workload finewebedu_lm"):
        benchmark.properties("v0.6", "finewebedu_lm")
    with pytest.raises(UserError, match="there is v0.5, v0.6, 2026"):
        benchmark.properties("v9", "ogbg")


def test_a_mini_data_set_keeps_its_counts_and_takes_the_numbers() -> None:
    assert benchmark.properties("2026", "ogbg_minidata") == benchmark.properties("2026", "ogbg")
    assert "target_metric_name" not in benchmark.properties("2026", "ogbg")


def test_versions_never_share_a_folder() -> None:
    words: dict[str, Any] = {"workload": "ogbg", "size": "full"}

    def label(**more: Any) -> str:
        return make_plan(ROOT, ["nadamw"], **words, **more).runs[0].label

    # The pinned AlgoPerf's own numbers are v0.6's.
    assert label() == label(version="v0.6") == "nadamw"
    assert label(version="2026") == "nadamw_2026"
    assert label(version="v0.5", ruleset="self") == "nadamw_v0.5_self"
    with pytest.raises(UserError, match="VERSION=2025: there is v0.5, v0.6, 2026"):
        label(version="2025")
    with pytest.raises(UserError, match="VERSION=2026: minis have targets and budgets"):
        make_plan(ROOT, ["nadamw"], size="mini", version="2026")
