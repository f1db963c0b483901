"""``factors.csv`` of a run, read: what became of every factor (docs/telemetry.md)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo import factor_log
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import files

_NUMBERS = (
    "global_step", "block", "size", "refreshed", "criterion", "staleness", "checks", "refreshes",
    "failures", "condition", "effective_rank",
)  # fmt: skip
_WORDS = ("parameter", "kind", "factor")
LETTERS = ("L", "R", "A")


@dataclass(frozen=True)
class Check:
    """One factor at one check; what is not known is nan. ``checks``, ``refreshes`` and ``failures``
    are so far."""

    step: int
    parameter: str
    kind: str
    block: int
    factor: str
    size: int
    refreshed: bool
    criterion: float
    staleness: float
    checks: int
    refreshes: int
    failures: int
    condition: float
    effective_rank: float

    @property
    def place(self) -> tuple[str, int, str]:
        """Which factor it is."""
        return self.parameter, self.block, self.factor

    @property
    def share_of_rank(self) -> float:
        """Effective rank over size."""
        return self.effective_rank / self.size


def read(folder: Path) -> list[Check]:
    """The checks of a run, in the order of steps; as far as the file is whole.

    Raises:
        UserError: there is no such file, or it is none of a run.
    """
    path = folder / factor_log.NAME
    try:
        header, lines, _ = files.read_csv(path)
    except files.Missing:
        raise UserError(
            f"{folder}: no {factor_log.NAME}: no run's folder, or that of a run without factors, "
            f"of before there was such a file, or with {factor_log.VARIABLE}=off"
        ) from None
    except files.Unreadable as error:
        raise UserError(f"{path}: {error}") from None
    if missing := [name for name in (*_WORDS, *_NUMBERS) if name not in header]:
        raise UserError(f"{path}: no column {missing[0]!r}: none of a run")
    return [_check(path, number, dict(zip(header, line, strict=True))) for number, line in lines]


def groups(checks: Iterable[Check], by: Callable[[Check], str]) -> dict[str, list[Check]]:
    """Checks by kind of parameter, by factor, or whatever ``by`` says, in a fixed order."""
    found: dict[str, list[Check]] = {}
    for check in checks:
        found.setdefault(by(check), []).append(check)
    order = ["weight", "bias", "norm", "embedding", *LETTERS]
    known = [name for name in order if name in found]
    return {name: found[name] for name in [*known, *sorted(set(found) - set(known))]}


def decompositions(checks: Sequence[Check]) -> tuple[list[int], list[float]]:
    """Steps, and decompositions of a factor until then, the mean over factors."""
    latest: dict[tuple[str, int, str], int] = dict.fromkeys((c.place for c in checks), 0)
    steps, means = [], []
    for step, now in by_step(checks):
        latest |= {c.place: c.refreshes for c in now}
        steps.append(step)
        means.append(sum(latest.values()) / len(latest))
    return steps, means


def shares(checks: Sequence[Check], bins: int = 20) -> tuple[list[float], list[float]]:
    """Decompositions over checks in equal parts of the training: middles of the parts, and shares.

    Counts between two checks that were written down belong to the part of the second.
    """
    last = max(c.step for c in checks)
    sums = [[0, 0] for _ in range(bins)]
    before: dict[tuple[str, int, str], tuple[int, int]] = {}
    for c in checks:
        done, due = before.get(c.place, (0, 0))
        part = sums[min(bins - 1, (c.step - 1) * bins // last)]
        part[0] += c.refreshes - done
        part[1] += c.checks - due
        before[c.place] = c.refreshes, c.checks
    middles = [(i + 0.5) * last / bins for i in range(bins)]
    known = [(m, done / due) for m, (done, due) in zip(middles, sums, strict=True) if due > 0]
    return [m for m, _ in known], [share for _, share in known]


def course(
    checks: Sequence[Check],
    value: Callable[[Check], float],
    of: Callable[[list[float]], float],
    bins: int = 25,
) -> tuple[list[float], list[float]]:
    """Middles of equal parts of the training, and what ``of`` makes of the values of all factors in
    each; parts without any are left out."""
    last = max(c.step for c in checks)
    parts: dict[int, list[float]] = {}
    for c in checks:
        if math.isfinite(v := value(c)):
            parts.setdefault((c.step - 1) * bins // last, []).append(v)
    return [(i + 0.5) * last / bins for i in sorted(parts)], [of(parts[i]) for i in sorted(parts)]


def by_step(checks: Iterable[Check]) -> list[tuple[int, list[Check]]]:
    """The checks of each step, in ascending order."""
    found: dict[int, list[Check]] = {}
    for c in checks:
        found.setdefault(c.step, []).append(c)
    return sorted(found.items())


@dataclass(frozen=True)
class Health:
    """What became of the factors of one group, over all of a run.

    ``checks``, ``decompositions`` and ``failures`` are sums; the others medians over factors and
    checks (``oldest`` the maximum) of what is known, else nan.
    """

    name: str
    factors: int
    checks: int
    decompositions: int
    failures: int
    criterion: float
    staleness: float
    oldest: float
    condition: float
    share_of_rank: float

    @property
    def share(self) -> float:
        return self.decompositions / self.checks if self.checks else math.nan


def health(name: str, checks: Sequence[Check]) -> Health:
    """Of one group of factors."""
    last = {c.place: c for c in checks}
    return Health(
        name,
        factors=len(last),
        checks=sum(c.checks for c in last.values()),
        decompositions=sum(c.refreshes for c in last.values()),
        failures=sum(c.failures for c in last.values()),
        criterion=_median(c.criterion for c in checks),
        staleness=_median(c.staleness for c in checks),
        oldest=max((c.staleness for c in checks), default=math.nan),
        condition=_median(c.condition for c in checks),
        share_of_rank=_median(c.share_of_rank for c in checks),
    )


def table(checks: Sequence[Check]) -> list[Health]:
    """Health of all factors, of each kind of parameter, and of each factor."""
    found = [health("all", checks)]
    found += [health(name, own) for name, own in groups(checks, lambda c: c.kind).items() if name]
    found += [health(name, own) for name, own in groups(checks, lambda c: c.factor).items()]
    return found


HEADER = (
    "", "factors", "checks", "new bases", "share", "failed", "Eq. 11", "age", "oldest", "condition",
    "rank/d",
)  # fmt: skip


def cells(row: Health) -> list[str]:
    """Texts of a row under :data:`HEADER`."""
    return [
        row.name,
        str(row.factors),
        str(row.checks),
        str(row.decompositions),
        shown(row.share, ".2f"),
        str(row.failures),
        shown(row.criterion, ".3g"),
        shown(row.staleness, ".0f"),
        shown(row.oldest, ".0f"),
        shown(row.condition, ".1e"),
        shown(row.share_of_rank, ".2f"),
    ]


def text(checks: Sequence[Check]) -> str:
    """:func:`table` for a terminal."""
    lines = [list(HEADER), *(cells(row) for row in table(checks))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        )
        for line in lines
    )


def shown(value: float, form: str) -> str:
    """A number, or a dash for nan."""
    return "-" if math.isnan(value) else format(value, form)


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.median(known) if known else math.nan


def _check(path: Path, number: int, row: dict[str, str]) -> Check:
    values = {}
    for name in _NUMBERS:
        value = files.number(row[name])
        if value is None or (name in _NUMBERS[:4] + _NUMBERS[5:9] and not math.isfinite(value)):
            raise UserError(
                f"{path}: line {number}: {name} is {files.printable(row[name], 40)!r}: no number"
            )
        values[name] = value
    return Check(
        step=int(values["global_step"]),
        parameter=files.printable(row["parameter"], 120),
        kind=files.printable(row["kind"], 20),
        block=int(values["block"]),
        factor=files.printable(row["factor"], 8),
        size=max(1, int(values["size"])),
        refreshed=bool(values["refreshed"]),
        criterion=values["criterion"],
        staleness=values["staleness"],
        checks=int(values["checks"]),
        refreshes=int(values["refreshes"]),
        failures=int(values["failures"]),
        condition=values["condition"],
        effective_rank=values["effective_rank"],
    )
