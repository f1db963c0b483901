"""The report's section on the preconditioner's health: what became of the factors of every row."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from algoperf_shampoo import factor_log
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import factors, figures, health, tables
from algoperf_shampoo.study.factors import Check
from algoperf_shampoo.study.figures import Drawn
from algoperf_shampoo.study.logs import Trial
from algoperf_shampoo.study.tables import Row, Table

FIGURES = 6
"""Rows of a page that are drawn, at most: a page is to stay under 5 MB."""
HEADER = (
    "Row", "Runs", "Checks", "New bases", "L", "R", "A", "Failed", "Gradients left out", "Eq. 11",
    "Age", "Condition", "Rank / d",
)  # fmt: skip
CAPTION = (
    "What became of the factors, over the runs that are counted: checks of bases, new bases, their "
    "share of checks (of all, and of L, R and A), decompositions that failed, and gradients that "
    "were not finite and left out; medians over factors and checks of Eq. 11, the bases' age in "
    "steps, condition numbers and effective rank over size, where runs have a factors.csv."
)


@dataclass(frozen=True)
class RowHealth:
    """One row's: counts over its runs, and checks of those that have a factors.csv."""

    runs: int
    checks: int
    refreshes: int
    failures: int
    skipped: int
    found: list[Check]


def of_row(row: Row, by_name: Mapping[str, Trial]) -> RowHealth | None:
    """None for a row without factors, or without runs that are counted."""
    groups = figures.counted([row], by_name)
    trials = groups[0][1] if groups else []
    totals = dict.fromkeys(("checks", "refreshes", "failures"), 0)
    skipped, found = 0, []
    for trial in trials:
        for name in totals:
            totals[name] += _last(health.counts(trial, f"eigenbasis_{name}"))
        skipped += _last(health.counts(trial, health.SKIPPED))
        found += checks_of(trial)
    if not totals["checks"]:
        return None
    return RowHealth(len(trials), **totals, skipped=skipped, found=found)


def checks_of(trial: Trial) -> list[Check]:
    """The checks of a run, none where it has no file of them that can be read."""
    if not (trial.path / factor_log.NAME).is_file():
        return []
    try:
        return factors.read(trial.path)
    except UserError:
        return []


def draw(made: Sequence[Table], trials: Sequence[Trial], root: Path) -> list[Drawn]:
    """The health beside the curve, of the first run of every row that has a factors.csv; of
    :data:`FIGURES` rows at most."""
    by_name = {tables.run_name(trial.path, root): trial for trial in trials}
    drawn: list[Drawn] = []
    for table in made:
        for number, row in tables.numbered(table):
            for _, group in figures.counted([row], by_name):
                known = ((trial, checks) for trial in group if (checks := checks_of(trial)))
                trial, checks = next(known, (None, []))
                if trial is not None and len(drawn) < FIGURES:
                    name = f"{table.size}_health_{number}"
                    drawn.append(health.beside_the_curve(trial, checks, name))
    return drawn


def section(table: Table, by_name: Mapping[str, Trial]) -> str:
    """The table as HTML; empty where no row has factors."""
    lines = []
    for number, row in tables.numbered(table):
        found = of_row(row, by_name)
        if found is not None:
            texts = [f"[{number}] {row.workload}, {row.name}", *_cells(found)]
            lines.append("".join(f"<td>{html.escape(text)}</td>" for text in texts))
    if not lines:
        return ""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in HEADER)
    rows = "\n".join(f"<tr>{line}</tr>" for line in [head, *lines])
    caption = f"<caption>{html.escape(CAPTION)}</caption>"
    return f'<div class="wide"><table>{caption}\n{rows}</table></div>'


def _cells(found: RowHealth) -> list[str]:
    by_factor = {row.name: row for row in factors.table(found.found)} if found.found else {}
    whole = by_factor.get("all")
    nan = math.nan
    shares = [by_factor[name].share if name in by_factor else nan for name in factors.LETTERS]
    return [
        str(found.runs),
        str(found.checks),
        f"{found.refreshes}\u00a0({found.refreshes / found.checks:.0%})",
        *(factors.shown(share, ".0%") for share in shares),
        str(found.failures),
        str(found.skipped),
        factors.shown(whole.criterion if whole else nan, ".3g"),
        factors.shown(whole.staleness if whole else nan, ".0f"),
        factors.shown(whole.condition if whole else nan, ".1e"),
        factors.shown(whole.share_of_rank if whole else nan, ".2f"),
    ]


def _last(counted: Sequence[tuple[int, int]]) -> int:
    return max((count for _, count in counted), default=0)
