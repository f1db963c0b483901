"""Memory of a run on one GPU by formula, on the parameter shapes of AlgoPerf's own models.

docs/performance.md has the formula; it leaves out activations and the input, which depend on the
batch. The shapes are in ``workloads/data/algoperf_shapes.json``, which
``scripts/data/algoperf_shapes.py`` made from AlgoPerf's code.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from algoperf_shampoo.harness.submission_loader import Optimizer

FLOAT32 = 4
ROOM = 2**30
"""Bytes that a refresh takes besides, at most, where GPUs share the work."""
CARD_GIB = {"v0.5": 16, "v0.6": 16, "2026": 40}
"""Memory of a GPU of the benchmark's hardware: V100, and A100 (40 GB)."""
_SHAPES = Path(__file__).parents[1] / "workloads" / "data" / "algoperf_shapes.json"

# Tensors like a block that a rule keeps, those it works in besides the gradient's place, and
# whether it keeps a vector per mode; of classes that differ from EShampoo, without grafting.
_EShampoo = (2, 1, False)
_KEPT = {
    "KLShampoo": (1, 1, True),
    "KLSOAP": (2, 1, True),
    "Shampoo": (1, 1, False),
    "Shampoo2Trace": (1, 1, False),
    "ShampooAdaptive": (1, 1, True),
}

_TWO_BUFFERS = ("KLShampoo", "KLSOAP")  # one more for blocks of order 3 and 4

Shapes = Sequence[tuple[tuple[int, ...], int]]


@dataclass(frozen=True)
class Need:
    """Bytes on one GPU, activations left out.

    Attributes:
        model: parameters, gradients, and the copy of gradients that DDP reduces.
        optimizer: the optimizer's state and buffers, and a refresh's workspace.
        largest: the shape whose parameters have the largest state, how many they are, and the bytes
            of that state.
    """

    model: int
    optimizer: int
    largest: tuple[tuple[int, ...], int, int]

    @property
    def total(self) -> int:
        return self.model + self.optimizer


def workloads() -> tuple[str, ...]:
    """Names of the workloads whose shapes are known, AlgoPerf's nine."""
    return tuple(_read())


def shapes(workload: str) -> list[tuple[tuple[int, ...], int]]:
    """Shapes of a workload's parameters, each with how many have it."""
    return [(tuple(entry["shape"]), entry["count"]) for entry in _read()[workload]]


def need(
    parameters: Shapes,
    point: Mapping[str, Any],
    processes: int = 4,
    optimizer: Optimizer | None = None,
) -> Need:
    """What a run needs besides activations.

    Args:
        parameters: shapes and counts, as :func:`shapes` gives them.
        point: the hyperparameters; without ``max_preconditioner_dim`` there are no factors.
        processes: GPUs of the run. Those of a rule with factors share the state, each with the
            gradients of all blocks and room for a refresh, unless the point's sharding is "off".
        optimizer: what the variant makes; a class that is not known here counts as EShampoo.
    """
    entries = sum(math.prod(shape) * count for shape, count in parameters)
    states = {shape: _state(shape, point, optimizer) * count for shape, count in parameters}
    largest = max(states, key=lambda shape: states[shape])
    workspace = int(point.get("eigen_workspace_mib", 8)) << 20 if _has_factors(point) else 0
    state = FLOAT32 * sum(states.values())
    if _has_factors(point) and processes > 1 and point.get("sharding", "auto") != "off":
        own = FLOAT32 * entries + (state - FLOAT32 * entries) // processes
        workspace += min((state - own) // 2, ROOM)
        state = own
    return Need(
        model=FLOAT32 * entries * (2 + (processes > 1)),
        optimizer=state + workspace,
        largest=(largest, dict(parameters)[largest], FLOAT32 * states[largest]),
    )


def preview(
    point: Mapping[str, Any],
    version: str = "2026",
    processes: int = 4,
    optimizer: Optimizer | None = None,
) -> list[str]:
    """One line a workload: what it needs of a GPU of the version's hardware, and what does not fit.

    Sizes are in GiB.
    """
    card = CARD_GIB[version]
    lines = []
    for workload in workloads():
        found = need(shapes(workload), point, processes, optimizer)
        line = (
            f"{workload}: {found.total / 2**30:.1f} of {card} GiB a GPU besides activations "
            f"(optimizer {found.optimizer / 2**30:.1f})"
        )
        if found.total > card * 2**30:
            shape, count, size = found.largest
            line += (
                f": does not fit: the state of {count} x [{', '.join(map(str, shape))}] alone "
                f"is {size / 2**30:.1f}"
            )
        lines.append(line)
    return lines


def _has_factors(point: Mapping[str, Any]) -> bool:
    return "max_preconditioner_dim" in point


def _kept(point: Mapping[str, Any], optimizer: Optimizer | None) -> tuple[int, int, bool]:
    name, settings = ("", {}) if optimizer is None else (optimizer.name, optimizer.settings)
    moments, work, vectors = _KEPT.get(name, _EShampoo)
    if settings.get("grafting", point.get("grafting")) == "adam":
        if name == "Shampoo":  # its own grafting has both moments as EShampoo
            return _EShampoo
        return moments + 2, work + 1, vectors
    return moments, work, vectors


def _state(shape: tuple[int, ...], point: Mapping[str, Any], optimizer: Optimizer | None) -> int:
    """Entries of one parameter's state and buffers in the optimizer."""
    entries = math.prod(shape)
    if not _has_factors(point):
        return 3 * entries  # M, D and gradients in stack order
    one_dim = point.get("one_dim", "full")
    moments, work, vectors = _kept(point, optimizer)
    total = 0
    for block in _partition().cut(shape, point["max_preconditioner_dim"]):
        order = len(block.shape)
        kept = {"full": True, "adam": order > 1, "only": order == 1}[one_dim]
        plain = block.shape == (1,) or not kept
        if optimizer is not None and optimizer.name in _TWO_BUFFERS and order > 2:
            total += math.prod(block.shape)
        total += (1 + work + (2 if plain else moments)) * math.prod(block.shape)
        if not plain:
            total += sum(2 * d * d + vectors * d for d in block.shape)
    return total


@functools.cache
def _partition() -> ModuleType:
    """``optim/blocks/partition.py`` by its file: it needs the standard library alone, while its
    package imports torch, which takes seconds and which a login node may lack."""
    name = f"{__name__}.partition"
    path = Path(__file__).parents[1] / "optim" / "blocks" / "partition.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the file is part of the package
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _read() -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(_SHAPES.read_text("utf-8"))["shapes"]
    return found
