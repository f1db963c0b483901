"""Reading workloads_config/<workload>.json: every key known, present and of the right type."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from algoperf_shampoo import json_input, versions
from algoperf_shampoo.errors import UserError

DEFAULT_DIR = versions.CONFIG_DIR
DEFAULT_VERSION = versions.DEFAULT

# A schema maps a key to a type, to a nested schema, or to [type] for a list of that type.
Schema = Mapping[str, Any]

COUNTS: Schema = {
    "eval_batch_size": int,
    "num_train_examples": int,
    "num_eval_train_examples": int,
    "num_validation_examples": int,
    "num_test_examples": int,
}
MINI: Schema = {
    **COUNTS,
    "step_hint": int,
    "max_steps": int,
    "eval_period_steps": int,
    "max_allowed_runtime_sec": float,
    "validation_target_value": float,
    "test_target_value": float,
}
DATA: Schema = {"file": str, "sha256": str}


@dataclass(frozen=True)
class WorkloadConfig:
    """A workload's facts at one size. Times in seconds; None where the size has no such thing."""

    source: Path
    target_metric_name: str
    model: dict[str, Any]
    eval_batch_size: int
    num_train_examples: int
    num_eval_train_examples: int
    num_validation_examples: int
    num_test_examples: int
    step_hint: int
    max_allowed_runtime_sec: float
    eval_period_time_sec: float
    validation_target_value: float
    test_target_value: float
    max_steps: int | None = None
    eval_period_steps: int | None = None
    data: dict[str, Any] | None = None


def _where(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _check_value(source: Path, key: str, value: Any, kind: Any) -> Any:
    """Returns the value (ints become floats where a float is asked for); ints must be positive."""
    if isinstance(kind, Mapping):
        return check_keys(source, key, value, kind)
    if isinstance(kind, list):
        if not isinstance(value, list) or not value:
            raise UserError(f"{source}: {key} is {value!r}; it must be a list that is not empty")
        return [_check_value(source, f"{key}[{i}]", v, kind[0]) for i, v in enumerate(value)]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str and isinstance(value, str) and value:
        return value
    if kind is int and number and isinstance(value, int) and value > 0:
        return value
    if kind is float and number and 0 < value < float("inf"):
        return float(value)
    wanted = {str: "a string", int: "a positive whole number", float: "a positive number"}[kind]
    raise UserError(f"{source}: {key} is {value!r}; it must be {wanted}")


def check_keys(source: Path, prefix: str, found: Any, schema: Schema) -> dict[str, Any]:
    """Checks an object against a schema.

    Raises:
      UserError: names the file, the key and the value at the first unknown or missing key or wrong
        type.
    """
    if not isinstance(found, dict):
        raise UserError(f"{source}: {prefix or 'the file'} is {found!r}; it must be an object")
    known = ", ".join(sorted(schema))
    for key in found:
        if key not in schema:
            raise UserError(
                f"{source}: unknown key {_where(prefix, key)} (value {found[key]!r}); "
                f"known here: {known}"
            )
    for key in schema:
        if key not in found:
            raise UserError(f"{source}: key {_where(prefix, key)} is missing; needed here: {known}")
    return {
        key: _check_value(source, _where(prefix, key), found[key], schema[key]) for key in schema
    }


def read_config(
    workload: str,
    mini: bool,
    model: Schema,
    data: Schema,
    config_dir: str | Path | None = None,
    version: str = DEFAULT_VERSION,
) -> WorkloadConfig:
    """Reads and checks one workload's file; both sizes are checked, whichever is asked for.

    Args:
      workload: name of the full workload, which names the file.
      mini: which size to return.
      model: schema of the model's sizes.
      data: schema of the mini data's settings beyond file and checksum.
      config_dir: folder of the file; None means workloads_config/ beside the package.
      version: AlgoPerf version of the full size's budget, targets and step hint, which are in the
        folder's ``versions/``.

    Raises:
      UserError: missing file, malformed JSON, or a key that is unknown, missing or of a wrong type.
    """
    source = (DEFAULT_DIR if config_dir is None else Path(config_dir)) / f"{workload}.json"
    found = json_input.read(source, "workload file")
    schema: Schema = {
        "workload": str,
        "target_metric_name": str,
        "full": {**COUNTS, "model": model},
        "mini": {**MINI, "model": model, "data": {**DATA, **data}},
    }
    checked = check_keys(source, "", found, schema)
    if checked["workload"] != workload:
        raise UserError(f"{source}: workload is {checked['workload']!r}; it must be {workload!r}")
    if mini:
        chosen = checked["mini"]
        # Minis are evaluated by steps, so that a curve does not depend on the machine's speed.
        chosen["eval_period_time_sec"] = chosen["max_allowed_runtime_sec"]
    else:
        chosen = checked["full"]
        chosen.update(_benchmark(checked, version, source.parent))
    for key in ("validation_target_value", "test_target_value"):
        if chosen[key] > 1:
            raise UserError(f"{source}: {key} is {chosen[key]!r}; it must be at most 1")
    return WorkloadConfig(source=source, target_metric_name=checked["target_metric_name"], **chosen)


def _benchmark(checked: Mapping[str, Any], version: str, config_dir: Path) -> dict[str, Any]:
    """What an AlgoPerf version says on a full workload, by :class:`WorkloadConfig`'s names."""
    found = versions.read(version, config_dir)
    settings = found.workloads.get(checked["workload"])
    if settings is None:
        raise UserError(f"AlgoPerf {version} has no workload {checked['workload']!r}")
    said = dataclasses.asdict(settings)
    metric = said.pop("target_metric_name")
    if metric != checked["target_metric_name"]:
        raise UserError(
            f"{config_dir / checked['workload']}.json: target_metric_name is "
            f"{checked['target_metric_name']!r}; AlgoPerf {version} has {metric!r}"
        )
    return said
