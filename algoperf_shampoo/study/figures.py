"""Figures of a set of runs: training curves with their targets, and time to target by variant.

Drawn to be read without colour: rows differ by line style, marker and shade of grey. matplotlib is
an optional extra (``figures``).
"""

from __future__ import annotations

import bisect
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.disk import write_atomically
from algoperf_shampoo.study import pooling
from algoperf_shampoo.study.logs import Trial
from algoperf_shampoo.study.tables import Row, Table, run_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
WIDTH, DPI = 6.5, 200  # inches of a page's text, dots an inch
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P")
GREYS = ("0.0", "0.35", "0.55")
TOGETHER = 4  # rows on one pair of axes, at most: more hide each other
_LONGEST = 100  # letters in a line
LATER = 0.1  # share of the steps after which curves are to be seen whole
SETTINGS: Any = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "algoperf-shampoo",  # the same names in every file that is made again
}


@dataclass(frozen=True)
class Drawn:
    """A figure as files: name without ending, caption, and its bytes by format."""

    name: str
    caption: str
    files: Mapping[str, bytes]


def draw(tables: Sequence[Table], trials: Sequence[Trial], root: Path) -> list[Drawn]:
    """Every figure that the runs allow: for each size, one of curves a workload, one of times.

    Args:
        tables: of the same trials, whose rows are the lines of the figures.

    Raises:
        UserError: no matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("no matplotlib in this Python: pip install -e '.[figures]'") from None
    by_name = {run_name(trial.path, root): trial for trial in trials}
    drawn = []
    with matplotlib.rc_context(SETTINGS):
        for table in tables:
            rows = [row for row in table.rows if row.runs]
            for workload in dict.fromkeys(row.workload for row in rows):
                own = [row for row in rows if row.workload == workload]
                figure = _curves(own, by_name)
                if figure is not None:
                    name = f"{table.size}_{_file_name(workload)}_curves"
                    drawn.append(saved(figure, name, _curves_caption(workload, table.size)))
            figure = _times(rows, by_name)
            if figure is not None:
                caption = (
                    f"{table.size}: submission time to the validation target; a mark is a run, the "
                    "bar mean ± standard error over the runs that hit, beside it hits over runs."
                )
                drawn.append(saved(figure, f"{table.size}_time_to_target", caption))
    return drawn


def write(drawn: Sequence[Drawn], folder: Path) -> list[Path]:
    """Write every format of every figure; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in drawn:
        for ending, content in figure.files.items():
            paths.append(folder / f"{figure.name}.{ending}")
            write_atomically(paths[-1], content)
    return paths


def mean_curve(trials: Sequence[Trial]) -> tuple[list[int], list[float]]:
    """Steps of any run's evaluation, and the mean of the metric there, as far as every run went.

    AlgoPerf's evaluations come by time, at other steps in each run: between its own a run counts by
    linear interpolation. Values that are not finite are left out.
    """
    curves = [
        [(e.step, e.value) for e in trial.evaluations if math.isfinite(e.value)] for trial in trials
    ]
    if not curves or not all(curves):
        return [], []
    low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
    steps = sorted({step for curve in curves for step, _ in curve if low <= step <= high})
    return steps, [statistics.fmean(_at(curve, step) for curve in curves) for step in steps]


def _at(curve: Sequence[tuple[int, float]], step: int) -> float:
    """Value at a step between the curve's first and last, ``curve`` in ascending order."""
    after = bisect.bisect_left(curve, step, key=lambda point: point[0])
    (right, value) = curve[after]
    if right == step:
        return value
    (left, before) = curve[after - 1]
    return before + (value - before) * (step - left) / (right - left)


def counted(rows: Sequence[Row], by_name: Mapping[str, Trial]) -> list[tuple[Row, list[Trial]]]:
    """Of each row the runs that the table counts, as far as they have curves; no empty ones."""
    groups = [
        (row, [t for name in row.runs if (t := by_name.get(name)) and t.outcome in pooling.COUNTED])
        for row in rows
    ]
    groups = [(row, [t for t in group if t.evaluations]) for row, group in groups]
    return [(row, group) for row, group in groups if group]


def _curves(rows: Sequence[Row], by_name: Mapping[str, Trial]) -> Figure | None:
    """Metric on the validation split against steps: each run thin, the mean of a row thick.

    A few rows on one pair of axes; more on one each, the means of the others in light grey.
    """
    groups = counted(rows, by_name)
    if not groups:
        return None
    metrics = dict.fromkeys(t.metric or "" for _, group in groups for t in group)
    title = plain(f"{rows[0].workload}: {' / '.join(metrics).replace('_', ' ')}")
    if len(groups) > TOGETHER:
        return _multiples(groups, title)
    figure, axes = _new(2.8 + 0.16 * len(groups))
    for number, (row, group) in enumerate(groups):
        style: dict[str, Any] = {
            "linestyle": STYLES[number % len(STYLES)],
            "color": GREYS[number // len(STYLES) % len(GREYS)],
        }
        marker = MARKERS[number % len(MARKERS)]
        _runs_of(axes, group, marker, style)
        axes.plot(
            *mean_curve(group), linewidth=1.4, marker=marker, markersize=2.5, markevery=0.15,
            label=plain(f"{row.name}, n = {row.ended}"), **style,
        )  # fmt: skip
    _frame(axes, [trial for _, group in groups for trial in group])
    axes.set_xlabel("steps")
    axes.set_title(title, loc="left")
    axes.set_ylabel("validation")
    _legend(figure, axes)
    return figure


def _multiples(groups: Sequence[tuple[Row, list[Trial]]], title: str) -> Figure:
    """A small pair of axes a row, all alike."""
    from matplotlib.figure import Figure

    columns = 3
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(WIDTH, 0.4 + 1.7 * lines), dpi=DPI)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    everything = [trial for _, group in groups for trial in group]
    for place, axes in enumerate(grid.flat):
        if place >= len(groups):
            axes.set_visible(False)
            continue
        row, group = groups[place]
        for _, other in groups:
            if other is not group:
                axes.plot(*mean_curve(other), linewidth=0.8, color="0.8")
        _runs_of(axes, group, "o", {"linestyle": "-", "color": "0.3"})
        axes.plot(*mean_curve(group), linewidth=1.6, color="0")
        axes.set_title(f"{_two_lines(row)}\nn = {row.ended}", loc="left", fontsize=6.5)
        _frame(axes, everything, named=place == 0)
        if place + columns >= len(groups):
            axes.set_xlabel("steps")
            axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel("validation")
    figure.suptitle(title, x=0.01, ha="left", fontsize=8)
    figure.tight_layout()
    return figure


def _runs_of(axes: Any, group: Sequence[Trial], marker: str, style: Mapping[str, Any]) -> None:
    """Each run thin, and a white mark where it hit its target."""
    for trial in group:
        points = [(e.step, e.value) for e in trial.evaluations if math.isfinite(e.value)]
        if points and len(group) > 1:
            axes.plot(*zip(*points, strict=True), linewidth=0.4, alpha=0.6, **style)
        if trial.steps_to_target is not None:
            value = next(e.value for e in trial.evaluations if e.step == trial.steps_to_target)
            axes.plot(
                [trial.steps_to_target], [value], marker, markersize=4, color=style["color"],
                markerfacecolor="white", zorder=3,
            )  # fmt: skip


def _frame(axes: Any, trials: Sequence[Trial], named: bool = True) -> None:
    """The vertical axis of what comes after the first steep part, and a line for every target."""
    longest = max((t.evaluations[-1].step for t in trials if t.evaluations), default=0)
    later = [
        e.value
        for t in trials
        for e in t.evaluations
        if math.isfinite(e.value) and e.step > LATER * longest
    ]
    targets = list(dict.fromkeys(t.target for t in trials if t.target is not None))
    shown = later + targets
    if shown and min(shown) < max(shown):
        margin = 0.06 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    for target in targets:
        axes.axhline(target, color="0.5", linewidth=0.8)
        if named:  # on the left, where curves are far from it
            axes.annotate(
                f"target {target:g}", (0.01, target), xycoords=("axes fraction", "data"),
                fontsize=7, xytext=(0, 2), textcoords="offset points", color="0.3",
            )  # fmt: skip


def _times(rows: Sequence[Row], by_name: Mapping[str, Trial]) -> Figure | None:
    """Time to target: a mark a run, mean and standard error a row; workloads one below another."""
    shown = [row for row in rows if row.ended]
    if not any(row.seconds for row in shown):
        return None
    workloads = list(dict.fromkeys(row.workload for row in shown))
    longest = max(row.seconds.mean for row in shown if row.seconds)
    unit, scale = ("min", 60.0) if longest > 600 else ("s", 1.0)
    from matplotlib.figure import Figure

    counts = [sum(row.workload == w for row in shown) for w in workloads]
    figure = Figure(figsize=(WIDTH, 0.6 * len(workloads) + 0.34 * len(shown)), dpi=DPI)
    grid = figure.subplots(
        len(workloads), 1, squeeze=False, gridspec_kw={"height_ratios": [c + 0.6 for c in counts]}
    )
    for workload, axes in zip(workloads, grid[:, 0], strict=True):
        own = [row for row in shown if row.workload == workload]
        for place, row in enumerate(reversed(own)):
            hits = f"{row.hits}/{row.ended}"
            if row.seconds is not None:
                mean, error = row.seconds.mean / scale, (row.seconds.error or 0.0) / scale
                axes.errorbar(
                    mean, place, xerr=error, fmt="|", color="black", capsize=3, linewidth=1.2,
                    markersize=9,
                )  # fmt: skip
                found = [by_name[name].time_to_target for name in row.runs if name in by_name]
                times = [seconds / scale for seconds in found if seconds is not None]
                axes.plot(
                    times, [place] * len(times), "o", markersize=4, markerfacecolor="none",
                    color="0.35", linestyle="none",
                )  # fmt: skip
            axes.annotate(
                hits, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=7
            )
        axes.set_yticks(range(len(own)), [_two_lines(row) for row in reversed(own)], fontsize=7)
        axes.set_ylim(-0.6, len(own) - 0.4)
        axes.set_xlim(left=0)
        axes.set_title(plain(workload), loc="left", fontsize=8)
    grid[-1, 0].set_xlabel(f"submission time to the target, {unit}")
    figure.tight_layout()
    return figure


def _curves_caption(workload: str, size: str) -> str:
    return (
        f"{workload}, {size}: validation metric against steps. Thick lines are means over seeds, "
        "as far as all seeds went, thin ones the runs; white marks, where a run hit the target. "
        "Runs that the table does not count are not drawn; light grey, where it is there, are the "
        "means of the other rows. The first tenth of the steps may lie outside."
    )


def _new(height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    return figure, figure.subplots()


def _legend(figure: Figure, axes: Any) -> None:
    """Below the axes, one row a line: names are long."""
    figure.legend(*axes.get_legend_handles_labels(), loc="lower left", ncols=1, handlelength=4)
    lines = len(axes.get_legend_handles_labels()[0])
    height = figure.get_figheight()
    figure.tight_layout(rect=(0, (0.18 * lines + 0.05) / height, 1, 1))


def saved(figure: Figure, name: str, caption: str) -> Drawn:
    """A figure in every format, under a name and with a caption."""
    files = {}
    for ending in FORMATS:
        content = io.BytesIO()
        # Without a date, the same runs make the same file.
        metadata = {"Date": None} if ending == "svg" else {"Software": None}
        figure.savefig(content, format=ending, metadata=metadata)
        files[ending] = content.getvalue()
    return Drawn(name, caption, files)


def _two_lines(row: Row) -> str:
    settings = plain(", ".join(row.settings))
    return f"{plain(row.title)}\n{settings}" if settings else plain(row.title)


def plain(text: str) -> str:
    """Text of a file or folder for a figure: not taken for a formula, and not wider than it."""
    shown = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    return shown.replace("$", r"\$")


def _file_name(text: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in text).lower()
