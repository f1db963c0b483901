"""AlgoPerf's hyperparameter search spaces: a list of fixed points, or ranges to draw points from.

A list holds points, all with the same keys. A dict maps each name to ``{"feasible_points": [...]}``
or ``{"min": a, "max": b, "scaling": "linear" | "log"}``; points are then drawn from a Halton
sequence (Halton 1960) whose digits are permuted by a generator seeded with 0, so that point k of a
file is the same on every machine. AlgoPerf's own draw is unseeded and cannot be repeated.
"""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from algoperf_shampoo.errors import UserError

F_KEY, TAU_KEY = "precondition_frequency", "tau"

_POSITIVE = ("above 0", lambda x: x > 0)
_NOT_NEGATIVE = ("at least 0", lambda x: x >= 0)
_FRACTION = ("between 0 and 1", lambda x: 0 <= x <= 1)
# What the fields known to the suite may hold; other fields pass as they are.
_RANGES = {
    "learning_rate": _POSITIVE,
    "epsilon": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "one_minus_beta1": _FRACTION,
    "one_minus_beta2": _FRACTION,
    "warmup_factor": _FRACTION,
    "label_smoothing": _FRACTION,
    "dropout_rate": ("at least 0 and below 1", lambda x: 0 <= x < 1),
    "step_hint_factor": _POSITIVE,
}
_INTEGERS = ("max_preconditioner_dim", F_KEY)


def read_points(path: Path, count: int, workload: str | None = None) -> list[dict[str, Any]]:
    """The first ``count`` points of the search space in ``path``.

    ``workload``: if the file maps workload names to lists of points, the name to look up, as it is
    or without ``_mini``.

    Raises:
        UserError: no such file, not JSON, unequal keys, a field out of range, too few points.
    """
    try:
        space = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such search space file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if workload is not None and isinstance(space, dict) and _is_per_workload(space):
        name = workload if workload in space else workload.removesuffix("_mini")
        if name not in space:
            raise UserError(f"{path}: no points for {workload!r}: it has {', '.join(space)}")
        space = space[name]
    if isinstance(space, list):
        points = _fixed_points(path, space)
    elif isinstance(space, dict) and space:
        points = _draw(path, space, count)
    else:
        raise UserError(
            f"{path}: a search space is a list of points or an object of ranges, "
            f"not {json.dumps(space)[:40]}"
        )
    if len(points) < count:
        raise UserError(f"{path}: {count} points asked for, the file has {len(points)}")
    for number, point in enumerate(points[:count], start=1):
        for key, value in point.items():
            _check_value(f"{path}: point {number}", key, value)
    return points[:count]


def override(point: dict[str, Any], f: int | None, tau: float | None, where: str) -> dict[str, Any]:
    """``point`` with its ``precondition_frequency`` and ``tau`` replaced where given."""
    changed = dict(point)
    for name, key, value in (("F", F_KEY, f), ("TAU", TAU_KEY, tau)):
        if value is None:
            continue
        if key not in changed:
            raise UserError(f"{name}={value}: {where} has no field {key!r} to override")
        changed[key] = value
    return changed


def parse_f(text: str) -> int:
    """F, steps between two checks of the basis: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise UserError(f"F={text}: the number of steps between checks, an integer of at least 1")
    return value


def parse_tau(text: str) -> float:
    """tau, the threshold of Eq. 11: at least 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise UserError(f"TAU={text}: the threshold of Eq. 11, at least 0 and below 1")
    return value


def as_namedtuple(point: dict[str, Any]) -> Any:
    """The point as submissions get it: a namedtuple ``Hyperparameters``."""
    return collections.namedtuple("Hyperparameters", point)(**point)


def _is_per_workload(space: dict[str, Any]) -> bool:
    return bool(space) and all(isinstance(points, list) for points in space.values())


def _fixed_points(path: Path, space: list[Any]) -> list[dict[str, Any]]:
    if not space:
        raise UserError(f"{path}: the list of points is empty")
    for number, point in enumerate(space, start=1):
        if not isinstance(point, dict) or not point:
            raise UserError(f"{path}: point {number} is {json.dumps(point)[:40]}, not an object")
        odd = sorted(set(point) ^ set(space[0]))
        if odd:
            here, there = (number, 1) if odd[0] in point else (1, number)
            raise UserError(
                f"{path}: key {odd[0]!r} is in point {here} and not in point {there}: "
                "all points need the same keys"
            )
    return space


def _draw(path: Path, space: dict[str, Any], count: int) -> list[dict[str, Any]]:
    names = list(space)
    columns = _halton(count, len(names))
    points: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, column in zip(names, columns, strict=True):
        for point, u in zip(points, column, strict=True):
            point[name] = _from_unit(f"{path}: {name}", space[name], float(u))
    return points


def _from_unit(where: str, entry: Any, u: float) -> Any:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {json.dumps(entry)} is neither feasible_points nor min/max")
    if set(entry) == {"feasible_points"}:
        choices = entry["feasible_points"]
        if not isinstance(choices, list) or not choices:
            raise UserError(f"{where}: feasible_points is {json.dumps(choices)}, not a list")
        return choices[int(u * len(choices))]
    if set(entry) != {"min", "max", "scaling"}:
        raise UserError(
            f"{where}: keys {', '.join(entry) or 'none'}; right are feasible_points, "
            "or min, max and scaling"
        )
    low, high, scaling = entry["min"], entry["max"], entry["scaling"]
    if not _is_number(low) or not _is_number(high) or low > high:
        raise UserError(f"{where}: min {low!r}, max {high!r}: two numbers, min <= max")
    if scaling == "linear":
        return low + u * (high - low)
    if scaling == "log" and low > 0:
        return low * math.exp(u * math.log(high / low))
    raise UserError(f"{where}: scaling {scaling!r}: linear, or log with min above 0")


def _halton(count: int, dims: int) -> np.ndarray:
    """Scrambled Halton points in [0, 1), float64 [dims, count], one prime base a dimension."""
    primes: list[int] = []
    candidate = 2
    while len(primes) < dims:
        if all(candidate % prime for prime in primes):
            primes.append(candidate)
        candidate += 1
    generator = np.random.Generator(np.random.PCG64(0))
    rows = []
    for base in primes:
        # 0 stays 0, so the endless zeros in front of a number's digits add nothing.
        digits = [0, *(int(d) for d in generator.permutation(np.arange(1, base)))]
        rows.append([_radical_inverse(index, base, digits) for index in range(1, count + 1)])
    return np.array(rows)


def _radical_inverse(index: int, base: int, digits: list[int]) -> float:
    value, scale = 0.0, 1.0 / base
    while index:
        index, digit = divmod(index, base)
        value += digits[digit] * scale
        scale /= base
    return value


def _check_value(where: str, key: str, value: Any) -> None:
    if not isinstance(value, (bool, int, float, str)) and value is not None:
        raise UserError(f"{where}: {key} is {json.dumps(value)[:40]}: one value, not a list")
    if key in _INTEGERS:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key} is {value!r}: an integer of at least 1")
    elif key == TAU_KEY:
        if value is not None and not (_is_number(value) and 0 <= float(value) < 1):
            raise UserError(f"{where}: tau is {value!r}: at least 0 and below 1, or null")
    elif key in _RANGES:
        words, accepts = _RANGES[key]
        if not _is_number(value) or not accepts(value):
            raise UserError(f"{where}: {key} is {value!r}: a number {words}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
