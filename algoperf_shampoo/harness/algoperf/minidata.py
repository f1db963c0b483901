"""AlgoPerf's workloads on a small data set: same model and pipeline, other counts and batch size.

``scripts/data/algoperf_mini.py`` writes a folder in AlgoPerf's on-disk formats and, beside
it, ``minidata.json``, which says how much there is. A workload run on it is called
``<workload>_minidata`` (AlgoPerf names variants of a workload that way), so that its logs cannot be
taken for those of the full data, nor for the embedded harness's ``_mini``, whose models are small.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from algoperf_shampoo import json_input
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.spec import MINIDATA

SUFFIX = MINIDATA
MANIFEST = "minidata.json"

# Properties of an AlgoPerf workload that depend on the amount of data, and their types.
_PROPERTIES: dict[str, type] = {
    "num_train_examples": int,
    "num_eval_train_examples": int,
    "num_validation_examples": int,
    "num_test_examples": int,
    "eval_batch_size": int,
    "step_hint": int,
    "max_allowed_runtime_sec": int,
    "eval_period_time_sec": int,
    "validation_target_value": float,
    "test_target_value": float,
}


@dataclass(frozen=True)
class Entry:
    """One workload of a manifest. ``on_disk`` are the counts for :mod:`.data_check`."""

    folder: Path
    global_batch_size: int
    max_global_steps: int
    properties: dict[str, int | float]
    on_disk: dict[str, int]


def base_name(workload: str) -> str:
    """``fastmri`` of ``fastmri_minidata``."""
    return workload.removesuffix(SUFFIX)


def read(data_dir: Path, workload: str) -> Entry:
    """The entry of ``workload``, from the manifest in ``data_dir`` or in one of its parents.

    Raises:
        UserError: no manifest, or one without this workload or with other fields.
    """
    base = base_name(workload)
    for folder in (data_dir, *list(data_dir.parents)[:2]):
        if (folder / MANIFEST).is_file():
            return _parse(folder, base)
    raise UserError(
        f"{data_dir}: no {MANIFEST}, so not a mini data set; make one: `make data-algoperf-mini`, "
        "or run the full data with SIZE=full"
    )


def register(data_dir: Path, workload: str, submission: ModuleType | None = None) -> None:
    """Teach AlgoPerf's registry the workload, and the submission its batch size, in this process.

    Args:
        data_dir: what ``--data_dir`` says.
        workload: ``<base>_minidata``.
        submission: the submission's module, whose ``get_batch_size`` then answers this workload.
    """
    entry = read(data_dir, workload)
    registry: Any = importlib.import_module("algoperf.workloads.workloads")
    registry.WORKLOADS[workload] = dict(registry.WORKLOADS[base_name(workload)])
    original = registry.import_workload

    def import_workload(workload_path: str, workload_class_name: str, **options: Any) -> Any:
        arguments = options.get("workload_init_kwargs") or {}
        cls = original(workload_path, workload_class_name, return_class=True)
        return with_properties(cls, entry.properties)(**arguments)

    registry.import_workload = import_workload
    if submission is not None:
        answer = submission.get_batch_size
        submission.get_batch_size = lambda name: (  # type: ignore[attr-defined]
            entry.global_batch_size if name == workload else answer(name)
        )


def with_properties(cls: type, values: dict[str, int | float]) -> type:
    """A subclass of a workload class whose properties have these values."""
    return type(cls.__name__, (cls,), {name: _constant(value) for name, value in values.items()})


def _constant(value: int | float) -> property:
    return property(lambda self: value)


def _parse(folder: Path, base: str) -> Entry:
    path = folder / MANIFEST
    manifest = json_input.read(path)
    entries = manifest.get("workloads") if isinstance(manifest, dict) else None
    if not isinstance(entries, dict):
        entries = {}
    if base not in entries:
        raise UserError(f"{path}: no data for {base!r}: it has {', '.join(entries) or 'none'}")
    entry = entries[base]
    try:
        properties = {name: kind(entry["properties"][name]) for name, kind in _PROPERTIES.items()}
        return Entry(
            folder=folder / entry["folder"],
            global_batch_size=int(entry["global_batch_size"]),
            max_global_steps=int(entry["max_global_steps"]),
            properties=properties,
            on_disk={name: int(count) for name, count in entry["on_disk"].items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: {base}: bad or missing field ({error}); make it again") from None
