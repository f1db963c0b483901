"""Table 1 of the paper from run folders: hits, steps and time to target, the paper's beside.

Means and standard errors (sample standard deviation / sqrt(n)) are over the runs that reach the
target, as in the paper. Runs are pooled only if they share label, workload, hyperparameters,
benchmark version, target, budget and data (see :mod:`.pooling`); seeds alone differ within a row.
Every row says what sets its point apart.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from algoperf_shampoo import json_input
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.harness.spec import MINI, MINIDATA
from algoperf_shampoo.study import differences, files, pooling
from algoperf_shampoo.study.differences import F_KEY, TAU_KEY, Difference
from algoperf_shampoo.study.logs import Trial, size_of

STUDIES = Path(__file__).with_name("studies")

# Fields that only the published Shampoo submission has, where it is Shampoo grafted from Adam.
_META = {
    "grafting_type": "ADAM",
    "use_momentum": False,
    "start_preconditioning_step": -1,
    "inv_root_override": 0,
    "use_normalized_grafting": False,
    "use_cosine_decay": True,
}

_STALENESS = (
    "F(1-beta2): steps between checks of the basis, in units of the memory of the averages, "
    "1/(1-beta2)."
)

# The embedded harness's small models, and AlgoPerf's models on little data.
_WORKLOADS = {"fastmri": "FastMRI", "imagenet_vit": "ImageNet ViT", "ogbg": "OGBG"}


@dataclass(frozen=True)
class Estimate:
    """Mean and standard error over ``n`` runs; the error is None for one run."""

    mean: float
    error: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate | None:
        """None of no values."""
        if not values:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error, len(values))

    def text(self, digits: int) -> str:
        """``4301 ± 109``."""
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:.{digits}f}{error}"


@dataclass(frozen=True)
class Comparison:
    """A row against the reference row: ratio of mean steps, and p-values before and after Holm's
    correction; see :mod:`.significance`. ``least``: the smallest that a difference could have."""

    reference: str
    steps_ratio: float | None
    difference: float
    difference_corrected: float
    equivalence: float
    equivalence_corrected: float
    verdict: str
    mark: str
    least: float
    decidable: bool


@dataclass(frozen=True)
class Pooled:
    """A setting against the reference over several workloads."""

    name: str
    workloads: list[str]
    runs: int
    reference_runs: int
    difference: float
    difference_corrected: float
    equivalence: float
    equivalence_corrected: float
    verdict: str


@dataclass(frozen=True)
class Row:
    """One line: a point on a workload. Steps and seconds to target, the paper's row.

    ``name`` is the variant (or the folder's label, if that is no variant's) with its ``settings``
    in brackets: F and tau, and every field that ``differs`` from the variant's own point.
    """

    workload: str
    name: str
    label: str
    version: str | None
    hits: int
    ended: int
    steps: Estimate | None
    seconds: Estimate | None
    paper: dict[str, Any] | None
    runs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    differs: list[Difference] = field(default_factory=list)
    settings: list[str] = field(default_factory=list)
    ruleset: str = ""
    framework: str = ""
    values: list[int | None] = field(default_factory=list)
    """Steps to target of each run that ended, None for a miss."""
    absent: str = ""
    """Why there can be no runs."""
    terms: list[str] = field(default_factory=list)
    """Of the runs: metric and target, most steps, most seconds, digest of the data."""
    made_by: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of the runs that count: sources, software and machine, with the number of runs of each."""
    comparison: Comparison | None = None
    paper_implies: str = ""
    paper_steps_ratio: float | None = None
    staleness: float | None = None
    """F(1 - beta2) of the point; see :func:`differences.staleness`."""
    paper_staleness: float | None = None

    @property
    def title(self) -> str:
        """The name without its settings."""
        return self.name.removesuffix(_bracketed(self.settings))


@dataclass(frozen=True)
class Table:
    """Rows of one size: "mini", "minidata" (AlgoPerf's workloads on little data) or "full"."""

    size: str
    caption: str
    rows: list[Row]
    pooled: list[Pooled] = field(default_factory=list)


def read_paper(path: Path) -> list[dict[str, Any]]:
    """Rows of ``results/paper/table1.json`` or ``table3.json``."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def build(
    trials: Sequence[Trial],
    paper: Sequence[dict[str, Any]],
    sizes: Sequence[str],
    root: Path,
    name: str = "Table 1",
    mini_f: Mapping[str, int | None] | None = None,
) -> list[Table]:
    """One table a size: a row for each of the paper's, with or without runs, then the other points.

    A full run is set beside the paper's row of its variant, F and tau; a mini, whose F is its own,
    beside that of its variant, or with ``mini_f`` beside the row whose F it translates to the
    mini's (None: the row has no counterpart), tau as it is and nothing else changed.

    Runs that are not to stop at their target are in no row; the caption counts them.
    """
    groups = pooling.rows(trials)
    differs = differences.find(groups, root)
    variants = submission_loader.variants(root)
    of = {key: differences.variant_of(group[0], variants) for key, group in groups.items()}

    def row(title: str, key: tuple[Any, ...], entry: dict[str, Any] | None) -> Row:
        name = differences.name_of(key, groups[key], variants)
        made = _row(title, name, groups[key], key[1], entry, differs[key], root)
        return replace(made, paper_staleness=_paper_staleness(entry, root))

    tables = []
    for size in sizes:
        suffix = {"mini": MINI, "minidata": MINIDATA}.get(size, "")
        own = {k: g for k, g in groups.items() if size_of(k[0]) == size}
        rows: list[Row] = []
        for base, title in _WORKLOADS.items():
            here = {k: g for k, g in own.items() if k[0] == base + suffix}
            for entry in (e for e in paper if e["workload"] == base and size != "minidata"):
                if size == "mini" and mini_f is not None:
                    f = mini_f.get(str(entry[F_KEY]), entry[F_KEY])
                    matching = [
                        k
                        for k in here
                        if f
                        and of[k] == entry["variant"]
                        and _is_mini_of(here[k][0], differs[k], entry, f)
                    ]
                else:
                    f = entry[F_KEY]
                    matching = [k for k in here if _is_of(here[k][0], of[k], entry, size, root)]
                rows += [row(title, key, entry) for key in matching]
                for key in matching:
                    del here[key]
                if not matching:
                    absent = "" if f else "no counterpart at this size"
                    empty = Row(title, entry["variant"], "", None, 0, 0, None, None, entry)
                    of_paper = _paper_staleness(entry, root)
                    rows.append(replace(empty, absent=absent, paper_staleness=of_paper))
            rows += [row(title, key, None) for key in sorted(here)]
        known = {base + suffix for base in _WORKLOADS}
        rows += [row(key[0], key, None) for key in sorted(own) if key[0] not in known]
        past = sum(1 for t in trials if not t.to_target and size_of(t.workload) == size)
        tables.append(Table(size, _caption(name, size, rows, own) + _left_out(past), rows))
    return tables


def table1(trials: Sequence[Trial], root: Path) -> list[Table]:
    """Every row of the paper's Table 1 at both sizes, and minidata runs, if any, in their own.

    ``root`` is the repository.
    """
    paper = read_paper(root / "results" / "paper" / "table1.json")
    return build(trials, paper, _sizes(trials), root)


def table3(trials: Sequence[Trial], root: Path) -> list[Table]:
    """As :func:`table1`, of Table 3; the study ``table3`` says what the paper's F is on a mini."""
    paper = read_paper(root / "results" / "paper" / "table3.json")
    path = STUDIES / "table3.json"
    # Without a study a mini's F is the paper's own.
    frequencies = json_input.read(path, "study file")["mini"]["F"] if path.is_file() else {}
    return build(trials, paper, _sizes(trials), root, "Table 3", frequencies)


TABLES = {"table1": table1, "table3": table3}
"""By the name of the make target."""


def _sizes(trials: Sequence[Trial]) -> list[str]:
    extra = ["minidata"] if any(size_of(trial.workload) == "minidata" for trial in trials) else []
    return ["mini", *extra, "full"]


def of_runs(trials: Sequence[Trial], root: Path) -> list[Table]:
    """Tables of some runs alone, without the rows that no run of theirs belongs to."""
    made = [replace(t, rows=[r for r in t.rows if r.runs]) for t in table1(trials, root)]
    return [table for table in made if table.rows]


def _is_of(trial: Trial, variant: str | None, entry: dict[str, Any], size: str, root: Path) -> bool:
    points = trial.hparams or {}
    if size == "mini":
        return trial.label == entry["variant"] and trial.trial == 1
    if variant != entry["variant"] and not _is_published(trial, entry, root):
        return False
    # A file may state tau = 0 or null for "refresh at every check": the paper's rows without tau.
    same_tau = (points.get("tau") or None) == entry["tau"]
    return same_tau and points.get("precondition_frequency") == entry["precondition_frequency"]


def _is_mini_of(trial: Trial, differs: list[Difference], entry: dict[str, Any], f: int) -> bool:
    point = trial.hparams or {}
    return (
        trial.trial == 1
        and point.get(F_KEY) == f
        and (point.get(TAU_KEY) or None) == entry["tau"]
        and all(difference.field in (F_KEY, TAU_KEY) for difference in differs)
    )


def _is_published(trial: Trial, entry: dict[str, Any], root: Path) -> bool:
    """Whether a published trial is just what the paper's grafting rows are runs of.

    The Shampoo submission's fields are more than ours; those that both have must be equal, and the
    others at the values at which its optimizer is the paper's.
    """
    point = trial.hparams or {}
    if entry["variant"] != "shampoo_grafting" or not _META.items() <= point.items():
        return False
    own = differences.own_point(root, entry["variant"], trial.workload) or {}
    shared = own.keys() & point.keys()
    return bool(shared) and all(own[name] == point[name] for name in shared)


def _paper_staleness(entry: dict[str, Any] | None, root: Path) -> float | None:
    """F(1 - beta2) of a row of the paper's, whose point is that of the full size."""
    if entry is None:
        return None
    own = differences.own_point(root, entry["variant"], entry["workload"])
    return differences.staleness({**(own or {}), F_KEY: entry[F_KEY]})


def _row(
    title: str,
    name: str,
    group: list[Trial],
    version: str,
    paper: dict[str, Any] | None,
    differs: list[Difference],
    root: Path,
) -> Row:
    hits = [t for t in group if t.outcome == "hit"]
    ended = len(hits) + sum(t.outcome == "miss" for t in group)
    first = group[0]
    notes = []
    if ended < len(group):
        notes.append(f"{len(group) - ended} of {len(group)} runs not counted: see below")
    for t in group:
        if t.outcome == "unfinished":
            notes.append(f"{t.study}/trial_{t.trial}: unfinished")
        notes += [f"{t.study}/trial_{t.trial}: {hole}" for hole in t.holes]
    made = pooling.made_by(group)
    notes += pooling.differing(made)
    trial = f" trial {first.trial}" if first.trial != 1 else ""
    settings = differences.settings(first.hparams or {}, differs)
    return Row(
        workload=title,
        name=name + trial + _bracketed(settings),
        label=first.label + trial,
        version=version,
        hits=len(hits),
        ended=ended,
        steps=Estimate.of([t.steps_to_target for t in hits if t.steps_to_target is not None]),
        seconds=Estimate.of([t.time_to_target for t in hits if t.time_to_target is not None]),
        paper=paper,
        runs=[run_name(t.path, root) for t in group],
        notes=notes,
        differs=differs,
        settings=settings,
        staleness=differences.staleness(first.hparams or {}),
        terms=list(first.terms),
        ruleset=first.ruleset,
        framework=first.framework,
        values=[t.steps_to_target for t in group if t.outcome in pooling.COUNTED],
        made_by=made,
    )


def _caption(name: str, size: str, rows: list[Row], own: dict[tuple[Any, ...], list[Trial]]) -> str:
    if size == "minidata":
        return (
            "AlgoPerf's own workloads and harness on little data (minidata): checks that the "
            "machinery runs. Targets are those of the data's manifest; nothing here is comparable "
            f"with {name}."
        )
    if size == "mini":
        targets = sorted({(k[0], g[0].metric, g[0].target) for k, g in own.items()}, key=str)
        shown = ", ".join(f"{w} {metric} {target:g}" for w, metric, target in targets if target)
        return (
            f"{name}, mini: the suite's own small models and data, its own targets"
            f"{f' ({shown})' if shown else ''}. Steps and submission time to the validation "
            "target, mean ± standard error over the runs that reach it. What is the paper's is of "
            f"the full size: compare the order of the variants, not the figures. {_STALENESS}"
        )
    versions = sorted({row.version for row in rows if row.version})
    return (
        f"{name}, full: steps and submission time to the validation target, mean ± standard error "
        "over the runs that reach it; benchmark version of targets and step hints: "
        f"{', '.join(f'AlgoPerf {v}' for v in versions) if versions else 'no runs yet'}. "
        f"The paper's version is not stated there. {_STALENESS}"
    )


def _left_out(past: int) -> str:
    if not past:
        return ""
    runs = f"{past} run{'s' * (past != 1)}"
    return f" Left out: {runs} of all steps, which do not stop at the target."


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: name, F(1-beta2), runs, hits, steps, time, and the paper's."""
    unit, scale, digits = ("min", 60.0, 2) if table.size == "full" else ("s", 1.0, 1)
    header = [
        *("Workload", "Variant", "F(1-beta2)", "Runs", "Hits", "Steps", f"Time [{unit}]"),
        *("Paper's", "paper's F(1-beta2)", "hits", "steps", "time [min]"),
    ]
    body = []
    for number, row in numbered(table):
        if not row.runs:
            measured = ["", row.absent or "no runs yet", "", ""]
        else:
            seconds = row.seconds
            if seconds is not None:
                error = seconds.error / scale if seconds.error is not None else None
                seconds = Estimate(seconds.mean / scale, error, seconds.n)
            measured = [
                f"[{number}]",
                f"{row.hits}/{row.ended}",
                (row.steps.text(0) if row.steps else "-") + _marked(row),
                seconds.text(digits) if seconds else "-",
            ]
        own = [row.workload, row.name, shown_staleness(row.staleness)]
        body.append([*own, *measured, *_paper_cells(row.paper, row.paper_staleness)])
    return header, body


def shown_staleness(value: float | None) -> str:
    """``2.51``; empty where there is no F."""
    return "" if value is None else f"{value:.3g}"


def _paper_cells(paper: dict[str, Any] | None, staleness: float | None) -> list[str]:
    if paper is None:
        return ["", "", "", "", ""]
    said = [paper["name"], shown_staleness(staleness)]
    if paper["hits"] is None:
        return [*said, "-", "-", "-"]
    steps = Estimate(paper["steps_mean"], paper["steps_se"], paper["hits"])
    time = Estimate(paper["time_min_mean"], paper["time_min_se"], paper["hits"])
    return [*said, f"{paper['hits']}/{paper['runs']}", steps.text(0), time.text(2)]


def numbered(table: Table) -> list[tuple[int, Row]]:
    """The rows with their numbers, 0 for one without runs."""
    numbers = iter(range(1, len(table.rows) + 1))
    return [(next(numbers) if row.runs else 0, row) for row in table.rows]


def _marked(row: Row) -> str:
    return f" {row.comparison.mark}" if row.comparison and row.comparison.mark else ""


def _bracketed(settings: Sequence[str]) -> str:
    """`` (F = 50, tau = 0.1)``, nothing of nothing."""
    return f" ({', '.join(settings)})" if settings else ""


def run_name(path: Path, root: Path) -> str:
    """A run's folder as rows list it: below ``root`` if it is there."""
    shown = path.relative_to(root) if path.is_relative_to(root) else path
    return files.printable(shown.as_posix(), 4096)
