"""Describe AlgoPerf's contract with a submission, from its own modules and source.

``python tests/contract/record.py`` in AlgoPerf's environment rewrites ``contract.json``, which the
tests use where AlgoPerf is not installed. Where it is, they compare the two.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import json
import sys
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("contract.json")
ROOT = Path(__file__).resolve().parents[2]
FUNCTIONS = (
    "init_optimizer_state",
    "update_params",
    "prepare_for_eval",
    "data_selection",
    "get_batch_size",
)
WORKLOADS = ("fastmri", "imagenet_vit", "ogbg", "mnist")
CONSTANTS = (
    "target_metric_name",
    "validation_target_value",
    "test_target_value",
    "step_hint",
    "max_allowed_runtime_sec",
    "eval_period_time_sec",
    "eval_batch_size",
    "num_train_examples",
    "num_eval_train_examples",
    "num_validation_examples",
    "num_test_examples",
)


def describe() -> dict[str, Any]:
    """The contract of the AlgoPerf that is installed here."""
    import torch

    from algoperf_shampoo.harness.algoperf import cpu_compat

    if not torch.cuda.is_available():
        cpu_compat.apply()
    runner: Any = importlib.import_module("submission_runner")
    spec: Any = importlib.import_module("algoperf.spec")
    registry: Any = importlib.import_module("algoperf.workloads.workloads")
    direct = importlib.metadata.distribution("algoperf").read_text("direct_url.json") or "{}"
    return {
        "algoperf_commit": json.loads(direct).get("vcs_info", {}).get("commit_id"),
        "signatures": {name: _signature(getattr(spec, name)) for name in FUNCTIONS},
        "calls": _calls(inspect.getsource(runner)),
        "flags": _flags(runner),
        "workloads": {name: _workload(registry, name) for name in WORKLOADS},
    }


def _signature(function: Any) -> list[dict[str, Any]]:
    return [
        {"name": p.name, "kind": p.kind.name, "required": p.default is p.empty}
        for p in inspect.signature(function).parameters.values()
    ]


def _calls(source: str) -> dict[str, Any]:
    """How the runner calls a submission: names by keyword, or number of positions."""
    found: dict[str, Any] = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name not in FUNCTIONS:
            continue
        keywords = [keyword.arg for keyword in node.keywords if keyword.arg]
        found[name] = {"keywords": keywords, "positions": [ast.unparse(a) for a in node.args]}
    return found


def _flags(runner: Any) -> dict[str, str]:
    from absl import flags

    own = flags.FLAGS.get_flags_for_module(runner)
    return {flag.name: flag.flag_type() for flag in sorted(own, key=lambda flag: flag.name)}


def _workload(registry: Any, name: str) -> dict[str, Any]:
    entry = registry.WORKLOADS[name]
    path = f"{registry.BASE_WORKLOADS_DIR}{entry['workload_path']}_pytorch/workload.py"
    workload = registry.import_workload(
        workload_path=path,
        workload_class_name=entry["workload_class_name"],
        workload_init_kwargs={},
    )
    return {
        "constants": {constant: getattr(workload, constant) for constant in CONSTANTS},
        "model_fn": _signature(workload.model_fn),
        "loss_fn": _signature(workload.loss_fn),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PATH.write_text(json.dumps(describe(), indent=1) + "\n", encoding="utf-8")
    print(f"wrote {PATH.name}")
