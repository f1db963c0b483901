"""AlgoPerf's hyperparameter search spaces: a list of fixed points, or ranges to draw points from.

A list holds points, all with the same keys. A dict maps each name to ``{"feasible_points": [...]}``
or ``{"min": a, "max": b, "scaling": "linear" | "log"}``; points are then drawn from a Halton
sequence (Halton 1960) whose digits are permuted by a generator seeded with 0, so that point k of a
file is the same on every machine. AlgoPerf's own draw is unseeded and cannot be repeated.

What a point may hold is declared in :mod:`algoperf_shampoo.points`.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from algoperf_shampoo import json_input, points
from algoperf_shampoo.errors import UserError

F_KEY, TAU_KEY = "precondition_frequency", "tau"


def read_points(
    path: Path, count: int, names: Sequence[str], workload: str | None = None
) -> list[dict[str, Any]]:
    """The first ``count`` points of the search space in ``path``, as they are written there.

    All points of a list are checked, and a range at both its ends, also where fewer are asked for.

    Args:
        names: the fields that the submission reads, as in its ``FIELDS``.
        workload: if the file maps workload names to lists of points, the name to look up, as it is
            or without ``_mini``.

    Raises:
        UserError: no such file, not JSON, unequal keys, a field that is unknown, missing or out of
            range, too few points.
    """
    space = json_input.read(path, "search space file")
    if workload is not None and isinstance(space, dict) and _is_per_workload(space):
        name = workload if workload in space else workload.removesuffix("_mini")
        if name not in space:
            have = ", ".join(map(points.shown, space))
            raise UserError(f"{path}: no points for {workload!r}: it has {have}")
        space = space[name]
    if isinstance(space, list):
        found = _fixed_points(path, space, names)
    elif isinstance(space, dict) and space:
        found = _draw(path, space, count, names)
    else:
        raise UserError(
            f"{path}: a search space is a list of points or an object of ranges, "
            f"not {points.shown(space)}"
        )
    if len(found) < count:
        raise UserError(f"{path}: {count} points asked for, the file has {len(found)}")
    return found[:count]


def one_point(space: Path, fields: Sequence[str], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The point of a self-tuning submission: the only one of the search space, fields replaced.

    Raises:
        UserError: there is another number of points.
    """
    found = json_input.read(space, "search space file")
    read_points(space, 1, fields)
    if not isinstance(found, list) or len(found) != 1:
        size = f"{len(found)} points" if isinstance(found, list) else "ranges"
        raise UserError(f"{space}: {size}: RULESET=self builds in the one point of a list")
    return override(found[0], changes, fields, where=str(space))


def override(
    point: dict[str, Any], settings: Mapping[str, Any], names: Sequence[str], where: str
) -> dict[str, Any]:
    """``point`` with the fields in ``settings`` replaced, checked again.

    Raises:
        UserError: the point and the settings do not go together.
    """
    changed = {**point, **settings}
    try:
        points.check(changed, names)
    except points.PointError as error:
        raise UserError(f"{where}: {error}") from error
    return changed


def parse_settings(
    names: Sequence[str], f: str | None, tau: str | None, text: str | None
) -> dict[str, Any]:
    """What ``F=``, ``TAU=`` and ``SET=`` say, as fields of a point.

    Raises:
        UserError: one of them cannot be read, is out of range, is there twice, or is a field that
            the submission does not read.
    """
    own = points.fields(names)
    given: dict[str, Any] = {}
    for word, key, value in (
        ("F", F_KEY, None if f is None else parse_f(f)),
        ("TAU", TAU_KEY, None if tau is None else parse_tau(tau)),
    ):
        if value is not None:
            if key not in {field.name for field in own}:
                raise UserError(f"{word}={value}: {points.unknown(key, own)}")
            given[key] = value
    try:
        settings = points.parse_setting(text or "", own)
    except points.PointError as error:
        raise UserError(f"SET: {error}") from error
    twice = sorted(set(given) & set(settings))
    if twice:
        raise UserError(f"SET: {twice[0]} is given by F= or TAU= as well")
    return given | settings


def parse_f(text: str) -> int:
    """F, steps between two checks of the basis: an integer of at least 1."""
    kind = points.BY_NAME[F_KEY].kind
    # isdecimal and isascii: int() would also take "1_0", "+1" and other scripts' digits.
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None
    if not kind.accepts(value):
        raise UserError(f"F={text[:40]}: the number of steps between checks, {kind}")
    assert value is not None
    return value


def parse_tau(text: str) -> float:
    """tau, the threshold of Eq. 11: at least 0 and below 1."""
    kind = points.BY_NAME[TAU_KEY].kind
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not kind.accepts(value) or points.vanishes(text, value):
        raise UserError(f"TAU={text[:40]}: the threshold of Eq. 11, {kind}")
    return value


def as_namedtuple(point: dict[str, Any]) -> Any:
    """The point as submissions get it: a namedtuple ``Hyperparameters``."""
    return collections.namedtuple("Hyperparameters", point)(**point)


def _is_per_workload(space: dict[str, Any]) -> bool:
    return bool(space) and all(isinstance(entry, list) for entry in space.values())


def _fixed_points(path: Path, space: list[Any], names: Sequence[str]) -> list[dict[str, Any]]:
    if not space:
        raise UserError(f"{path}: the list of points is empty")
    for number, point in enumerate(space, start=1):
        where = f"{path}: point {number}"
        if not isinstance(point, dict) or not point:
            raise UserError(f"{where} is {points.shown(point)}, not an object")
        try:
            points.check(point, names)
        except points.PointError as error:
            raise UserError(f"{where}: {error}") from error
        odd = sorted(set(point) ^ set(space[0]))
        if odd:
            here, there = (number, 1) if odd[0] in point else (1, number)
            raise UserError(
                f"{path}: key {odd[0]!r} is in point {here} and not in point {there}: "
                "all points need the same keys"
            )
    return space


def _draw(
    path: Path, space: dict[str, Any], count: int, names: Sequence[str]
) -> list[dict[str, Any]]:
    own = {field.name: field for field in points.fields(names)}
    for name, entry in space.items():
        if name not in own:
            raise UserError(f"{path}: {points.unknown(name, list(own.values()))}")
        _check_entry(f"{path}: {name}", entry, own[name])
    columns = _halton(count, len(space))
    drawn: list[dict[str, Any]] = [{} for _ in range(count)]
    for (name, entry), column in zip(space.items(), columns, strict=True):
        for point, u in zip(drawn, column, strict=True):
            point[name] = _from_unit(entry, float(u))
    for number, point in enumerate(drawn, start=1):
        try:
            points.check(point, names)
        except points.PointError as error:
            raise UserError(f"{path}: point {number} drawn from it: {error}") from error
    return drawn


def _check_entry(where: str, entry: Any, field: points.Field) -> None:
    """Raises UserError unless all that can be drawn from ``entry`` suits the field."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: {points.shown(entry)} is neither feasible_points nor min/max")
    if set(entry) == {"feasible_points"}:
        ends = entry["feasible_points"]
        if not isinstance(ends, list) or not ends:
            raise UserError(f"{where}: feasible_points is {points.shown(ends)}, not a list")
    elif set(entry) == {"min", "max", "scaling"}:
        ends = [entry["min"], entry["max"]]
        if not isinstance(field.kind, points.Number) or field.kind.integer:
            raise UserError(f"{where}: takes feasible_points alone: it is {field.kind}")
    else:
        keys = ", ".join(map(points.shown, entry)) or "none"
        raise UserError(f"{where}: keys {keys}; right are feasible_points, or min, max and scaling")
    for value in ends:
        try:
            points.check_value(field, value)
        except points.PointError as error:
            raise UserError(f"{where}: {error}") from error
    if "min" in entry:
        low, high, scaling = entry["min"], entry["max"], entry["scaling"]
        if low > high:
            raise UserError(f"{where}: min {low!r}, max {high!r}: two numbers, min <= max")
        if scaling not in ("linear", "log") or (scaling == "log" and low <= 0):
            raise UserError(
                f"{where}: scaling {points.shown(scaling)}: linear, or log with min above 0"
            )


def _from_unit(entry: dict[str, Any], u: float) -> Any:
    """The value at ``u`` in [0, 1) of a checked entry."""
    if "feasible_points" in entry:
        choices = entry["feasible_points"]
        return choices[int(u * len(choices))]
    low, high = float(entry["min"]), float(entry["max"])
    if entry["scaling"] == "linear":
        return low + u * (high - low)
    # Rounding must not carry it past the ends.
    return min(max(low * math.exp(u * math.log(high / low)), low), high)


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
