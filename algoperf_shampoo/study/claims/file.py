"""The file of a study of claims: what is claimed, of which runs, and how it will be decided.

``studies/claims.json``, or a file of your own, is a study (:mod:`..study`) in which ``arms`` stand
in place of ``rows``::

    {"title": "...",
     "mini": {"seeds": "201,202,203", "all_steps": true, "set": {"learning_rate": 0.004}},
     "quick": {"seeds": "201,202", "steps": 100},
     "arms": {"grafting": {"variant": "shampoo_grafting", "F": 20}, ...},
     "claims": [{"name": "eshampoo_grafting", "source": "Fig. 2", "hypothesis": "...",
                 "parts": [{"statistic": "loss", "low": ["eshampoo"], "high": ["grafting"],
                            "rule": "less"}]},
                {"name": "...", "source": "...", "hypothesis": "...", "waits_for": ["..."]}]}

An arm is a row of the study on each of the three workloads; its ``F`` is a mini's own. A part says
that the arms ``low`` have less of the statistic than the arms ``high``, or than the number
``than``. With two arms on a side their sum counts, of logarithms where the statistic is a loss: so
a difference in differences is written. ``rule`` is

* "less": the difference is below 0;
* "noninferior": it is below ``margin``;
* "equivalent": it is between -``margin`` and ``margin``.

An arm whose learning rate is tuned has ``rates`` in place of one, its own grid, and the file says
by which seeds: ``"tuning": {"seeds": "101,102", "evals": 500}``, none that it reports. On each
mini an arm's rate is that with the lowest mean loss over them (:mod:`.tuning`). All grids are of
one size.

``"curves": {"figure1": {"of": "Figure 1", "arms": [...]}}`` are figures of arms' training losses
over the steps, and which of the paper's each stands beside.

The margin of a loss is relative: 0.02 is a loss that is 2% larger. A claim holds if all of its
parts do. One that ``waits_for`` something has no parts yet, and is a row that says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from algoperf_shampoo import json_input
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import plan
from algoperf_shampoo.study.claims.statistics import STATISTICS

RULES = ("less", "noninferior", "equivalent")
_FILE = {"title", "mini", "quick", "arms", "claims"}
_QUICK = {"seeds", "steps", "evals"}
_TUNING = {"seeds", "evals"}
_ARM = {"variant", "F", "tau", "set", "rates"}
RATE = "learning_rate"
_CURVES = {"of", "arms"}
_CLAIM = {"name", "source", "hypothesis", "parts", "waits_for"}
_PART = {"statistic", "low", "high", "than", "rule", "margin"}


@dataclass(frozen=True)
class Part:
    """One comparison of a claim: ``low`` less ``high`` (arms) less ``than``, by a rule."""

    statistic: str
    low: tuple[str, ...]
    high: tuple[str, ...]
    than: float
    rule: str
    margin: float

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm of it."""
        return (*self.low, *self.high)

    def text(self) -> str:
        """``loss: eshampoo < grafting``."""
        right = " + ".join(self.high) if self.high else f"{self.than:g}"
        sign = {"less": "<", "noninferior": "<=", "equivalent": "="}[self.rule]
        within = "" if self.rule == "less" else f", margin {self.margin:g}"
        return f"{self.statistic}: {' + '.join(self.low)} {sign} {right}{within}"


@dataclass(frozen=True)
class Claim:
    """A hypothesis and where it is from; ``parts`` decide it, all of them together."""

    name: str
    source: str
    hypothesis: str
    parts: tuple[Part, ...]
    waits_for: tuple[str, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm of its parts, once."""
        return tuple(dict.fromkeys(arm for part in self.parts for arm in part.arms))


@dataclass(frozen=True)
class Curves:
    """A figure of training losses: its name, which of the paper's is like it, and its arms."""

    name: str
    of: str
    arms: tuple[str, ...]


@dataclass(frozen=True)
class Declared:
    """A file of claims, read. ``arms`` in its order; ``rates``: the grids of those that are tuned,
    ascending."""

    title: str
    arms: tuple[str, ...]
    claims: tuple[Claim, ...]
    seeds: tuple[int, ...]
    quick_seeds: tuple[int, ...]
    quick_steps: int
    quick_evals: int | None = None
    tuning_seeds: tuple[int, ...] = ()
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    curves: tuple[Curves, ...] = ()


def read(path: Path) -> Declared:
    """The claims of a file.

    Raises:
        UserError: a mistake in it, in one line.
    """
    content = json_input.read(path, "study of claims")
    return _declared(path, content)


def as_study(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content of a file of claims in the form of any other study: rows, and its mini.

    Raises:
        UserError: a mistake in it, in one line; or its arms are to be tuned first.
    """
    if _declared(path, content).rates:
        raise UserError(f"{path}: learning rates are tuned first: make claims CLAIMS={path.stem}")
    return measured(content, {})


def measured(content: dict[str, Any], rates: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """The runs that claims are about, as a study. Rows of arms that are tuned, but have no entry in
    ``rates`` (by arm and workload) yet, are None."""
    rows = [
        _row(content["arms"][arm], workload, rates.get((arm, workload)))
        for arm in content["arms"]
        for workload in plan.WORKLOADS
    ]
    return {"title": content["title"], "mini": content["mini"], "rows": rows}


def tuning(content: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str, float]]]:
    """The runs that rates are chosen by, as a study, and arm, workload and rate of each row."""
    places = [
        (name, workload, rate)
        for name, arm in content["arms"].items()
        for workload in plan.WORKLOADS
        for rate in sorted(arm.get("rates", ()))
    ]
    rows = [_row(content["arms"][arm], workload, rate) for arm, workload, rate in places]
    mini = {**content["mini"], **content.get("tuning", {})}
    return {"title": content["title"], "mini": mini, "rows": rows}, places


def _row(arm: dict[str, Any], workload: str, rate: float | None) -> dict[str, Any] | None:
    row = {"workload": workload, **{name: v for name, v in arm.items() if name != "rates"}}
    if "rates" not in arm:
        return row
    return None if rate is None else {**row, "set": {**row.get("set", {}), RATE: rate}}


def place(row: int, arms: tuple[str, ...]) -> tuple[str, str]:
    """The arm and the workload of a row of :func:`as_study`, counted from 1."""
    arm, workload = divmod(row - 1, len(plan.WORKLOADS))
    return arms[arm], plan.WORKLOADS[workload]


def _declared(path: Path, content: Any) -> Declared:
    json_input.check_keys(content, _FILE | {"tuning", "curves"}, _FILE, str(path))
    json_input.check_keys(content["quick"], _QUICK, _QUICK - {"evals"}, f"{path}: quick")
    arms = content["arms"]
    if not isinstance(arms, dict) or not arms:
        raise UserError(f"{path}: arms: an object of at least one arm")
    for name, arm in arms.items():
        json_input.check_keys(arm, _ARM, {"variant"}, f"{path}: arm {name}")
    mini = content["mini"]
    if not isinstance(mini, dict) or mini.get("all_steps") is not True:
        raise UserError(f"{path}: mini.all_steps: true: claims are on a fixed number of steps")
    if "F" in mini:
        raise UserError(f"{path}: mini.F: leave it out: the F of an arm is a mini's own")
    for name in ("steps", "evals"):
        number = content["quick"].get(name, 1)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise UserError(f"{path}: quick.{name} is {number!r}: a whole number of at least 1")
    if not isinstance(content["claims"], list) or not content["claims"]:
        raise UserError(f"{path}: claims: a list of at least one claim")
    claims = tuple(
        _claim(claim, arms, f"{path}: claim {number}")
        for number, claim in enumerate(content["claims"], start=1)
    )
    names = [claim.name for claim in claims]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path}: claim {twice!r} is there twice")
    used = {arm for claim in claims for arm in claim.arms}
    unused = next((arm for arm in arms if arm not in used), None)
    if unused is not None:
        raise UserError(f"{path}: arm {unused}: no claim has it")
    seeds = tuple(plan.parse_seeds(str(mini.get("seeds", 1))))
    rates = _rates(path, arms)
    tuning_seeds = _tuning_seeds(path, content, seeds) if rates or "tuning" in content else ()
    return Declared(
        title=str(content["title"]),
        arms=tuple(arms),
        claims=claims,
        seeds=seeds,
        quick_seeds=tuple(plan.parse_seeds(str(content["quick"]["seeds"]))),
        quick_steps=content["quick"]["steps"],
        quick_evals=content["quick"].get("evals"),
        tuning_seeds=tuning_seeds,
        rates=rates,
        curves=_curves(path, content.get("curves", {}), arms),
    )


def _curves(path: Path, given: Any, arms: Mapping[str, Any]) -> tuple[Curves, ...]:
    if not isinstance(given, dict):
        raise UserError(f"{path}: curves: an object of figures")
    for name, figure in given.items():
        where = f"{path}: curves.{name}"
        json_input.check_keys(figure, _CURVES, _CURVES, where)
        if not name.isidentifier():
            raise UserError(f"{where}: {name!r}: letters, digits and _ alone")
        if not _texts(figure["arms"]) or not figure["arms"]:
            raise UserError(f"{where}.arms: a list of arms")
        for arm in figure["arms"]:
            if arm not in arms:
                raise UserError(f"{where}: no arm {arm!r}: there is {', '.join(arms)}")
    return tuple(Curves(n, str(f["of"]), tuple(f["arms"])) for n, f in given.items())


def _rates(path: Path, arms: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    grids = {}
    for name, arm in arms.items():
        if "rates" not in arm:
            continue
        grid, where = arm["rates"], f"{path}: arm {name}: rates"
        if not isinstance(grid, list) or not all(_number(r) and r > 0 for r in grid):
            raise UserError(f"{where} is {grid!r}: a list of numbers above 0")
        if len(set(grid)) < max(2, len(grid)):
            raise UserError(f"{where} is {grid!r}: at least two, each once")
        if RATE in arm.get("set", {}):
            raise UserError(f"{where}: or set.{RATE}, not both")
        grids[name] = tuple(sorted(grid))
    sizes = {name: len(grid) for name, grid in grids.items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"{path}: rates: grids of one size for all arms, and there is {shown}")
    return grids


def _tuning_seeds(path: Path, content: dict[str, Any], seeds: tuple[int, ...]) -> tuple[int, ...]:
    if "tuning" not in content:
        raise UserError(f"{path}: tuning: arms have rates, and no seeds to choose among them by")
    json_input.check_keys(content["tuning"], _TUNING, {"seeds"}, f"{path}: tuning")
    own = tuple(plan.parse_seeds(str(content["tuning"]["seeds"])))
    if both := sorted(set(own) & set(seeds)):
        raise UserError(f"{path}: tuning.seeds: {both[0]} is reported as well: other seeds")
    return own


def _claim(claim: Any, arms: Mapping[str, Any], where: str) -> Claim:
    json_input.check_keys(claim, _CLAIM, {"name", "source", "hypothesis"}, where)
    where = f"{where} ({claim['name']})"
    parts, waits_for = claim.get("parts", []), claim.get("waits_for", [])
    if not _texts(waits_for) or not isinstance(parts, list) or bool(parts) == bool(waits_for):
        raise UserError(f"{where}: either parts, or a list of what it waits_for")
    return Claim(
        name=str(claim["name"]),
        source=str(claim["source"]),
        hypothesis=str(claim["hypothesis"]),
        parts=tuple(_part(p, arms, f"{where}: part {n}") for n, p in enumerate(parts, start=1)),
        waits_for=tuple(waits_for),
    )


def _part(part: Any, arms: Mapping[str, Any], where: str) -> Part:
    json_input.check_keys(part, _PART, {"statistic", "low", "rule"}, where)
    low, high = part["low"], part.get("high", [])
    if not _texts(low) or not low or not _texts(high) or bool(high) == ("than" in part):
        raise UserError(f"{where}: low is a list of arms, and so is high, or than is a number")
    for arm in (*low, *high):
        if arm not in arms:
            raise UserError(f"{where}: no arm {arm!r}: there is {', '.join(arms)}")
    if part["statistic"] not in STATISTICS:
        known = ", ".join(STATISTICS)
        raise UserError(f"{where}: statistic {part['statistic']!r}: there is {known}")
    if part["rule"] not in RULES:
        raise UserError(f"{where}: rule {part['rule']!r}: there is {', '.join(RULES)}")
    logarithmic = STATISTICS[part["statistic"]].logarithmic
    than, margin = part.get("than", 0.0), part.get("margin", 0.0)
    if not _number(than) or (logarithmic and "than" in part):
        raise UserError(f"{where}: than is {than!r}: a number, and of no loss")
    if logarithmic and len(low) != len(high):
        raise UserError(f"{where}: as many arms in low as in high: logarithms are added")
    if not _number(margin) or (part["rule"] == "less") != (margin == 0) or margin < 0:
        raise UserError(f"{where}: margin is {margin!r}: above 0, and none for the rule less")
    return Part(part["statistic"], tuple(low), tuple(high), than, part["rule"], margin)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
