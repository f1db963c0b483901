"""The preconditioner's health, drawn beside the curve; and eigendecompositions over training, on
the axes of the paper's Figures 4 and 7. Both of one run, from its ``factors.csv``.

Drawn as :mod:`.figures` draws: greys, line styles and markers, readable without colour.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import factors, files
from algoperf_shampoo.study.factors import Check
from algoperf_shampoo.study.figures import (
    DPI,
    MARKERS,
    SETTINGS,
    STYLES,
    WIDTH,
    Drawn,
    plain,
    saved,
)
from algoperf_shampoo.study.logs import Trial

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {
    "weight": "weights", "bias": "biases", "norm": "normalization layers",
    "embedding": "embeddings", "L": "L, left", "R": "R, right", "A": "A, of vectors",
}  # fmt: skip
_SHADES = ("0.0", "0.45", "0.25", "0.6")
SKIPPED = "gradients_skipped"


def figure4(trial: Trial, checks: Sequence[Check], name: str) -> Drawn:
    """Eigendecompositions over training, by kind of parameter and by factor.

    Raises:
        UserError: no matplotlib, or no check yet.
    """
    _need(trial, checks)
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        return saved(_figure4(checks), name, _FIGURE4.format(run=words(trial)))


def beside_the_curve(trial: Trial, checks: Sequence[Check], name: str) -> Drawn:
    """The validation curve, and below it what the preconditioner did.

    Raises:
        UserError: no matplotlib, or no check yet.
    """
    _need(trial, checks)
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        return saved(_course(trial, checks), name, _HEALTH.format(run=words(trial)))


def words(trial: Trial) -> str:
    """A run, for a caption."""
    seed = "" if trial.seed is None else f", seed {trial.seed}"
    return f"{trial.label}, {trial.workload}{seed}"


def file_name(trial: Trial) -> str:
    """A run, for a file's name."""
    name = f"{trial.label}_{trial.workload}_{trial.study}_trial_{trial.trial}"
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.") else "_" for c in name)


_FIGURE4 = (
    "{run}: eigendecompositions over training, the axes of the paper's Figures 4 and 7 (there: "
    "Imagewoof, tau = 0.1, F = 1). Above, decompositions over checks in twentieths of the "
    "training; below, decompositions of a factor so far, the mean over factors, whose number is in "
    "brackets. Left by kind of parameter, right by factor."
)
_HEALTH = (
    "{run}: the curve, and the preconditioner beside it. Lines are medians over factors and checks "
    "in 25 parts of the training, thin ones maxima; Eq. 11 and age are those at a check, before "
    "it. A condition number of 1 / (d eps), 1e5 to 1e6, is rounding."
)


def _need(trial: Trial, checks: Sequence[Check]) -> None:
    if not checks:
        raise UserError(f"{trial.path}: no check of a factor yet")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("no matplotlib in this Python: pip install -e '.[figures]'") from None


def _figure4(checks: Sequence[Check]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI)
    grid = figure.subplots(2, 2, sharex=True)
    for column, (title, by) in enumerate(
        (("by kind of parameter", lambda c: c.kind), ("by factor", lambda c: c.factor))
    ):
        above, below = grid[0, column], grid[1, column]
        for number, (group, own) in enumerate(factors.groups(checks, by).items()):
            size = len({c.place for c in own})
            label = plain(f"{_NAMES.get(group, group) or 'of unknown kind'} ({size})")
            above.plot(*factors.shares(own), label=label, **_style(number, marked=True))
            below.plot(*factors.decompositions(own), **_style(number))
        above.set_title(title, loc="left")
        above.set_ylim(-0.03, 1.03)
        below.set_ylim(0, 1.5 * max(1.0, *(max(line.get_ydata()) for line in below.lines)))
        below.set_xlabel("steps")
        below.legend(*above.get_legend_handles_labels(), loc="upper left", handlelength=3.5)
    grid[0, 0].set_ylabel("decompositions / checks")
    grid[1, 0].set_ylabel("decompositions of a factor")
    figure.tight_layout()
    return figure


def _course(trial: Trial, checks: Sequence[Check]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 7.6), dpi=DPI)
    panels = figure.subplots(6, 1, sharex=True, height_ratios=[1.5, 1, 1, 1, 1, 0.6])
    curve, criterion, age, condition, rank, trouble = panels
    _curve(curve, trial)
    groups = factors.groups(checks, lambda c: c.factor)
    maximum = (max, 0.6)
    median = (statistics.median, 1.3)
    tau = (trial.hparams or {}).get("tau")
    has_tau = isinstance(tau, float) and tau > 0
    for axes, value, title, lines in (
        (
            criterion,
            lambda c: c.criterion,
            "Eq. 11" + (f" (line: tau = {tau:g})" if has_tau else ""),
            (median, maximum),
        ),
        (age, lambda c: c.staleness, "age of bases, steps", (median, maximum)),
        (condition, lambda c: c.condition, "condition number", (median,)),
        (rank, lambda c: c.share_of_rank, "effective rank / d", (median,)),
    ):
        _lines(axes, groups, value, lines)
        axes.set_title(title, loc="left")
    if not criterion.lines:
        _say(criterion, "not known: this rule keeps roots, of which Eq. 11 says nothing")
    elif has_tau:
        criterion.axhline(tau, color="0.5", linewidth=0.8)
    if criterion.lines:
        low = min(min(filter(None, line.get_ydata()), default=1.0) for line in criterion.lines)
        criterion.set_yscale("log")
        criterion.set_ylim(max(1e-4, 0.7 * low), 1.5)
    rank.set_ylim(bottom=0)
    for axes in (age, condition):
        if axes.lines:
            _decades(axes)
    _trouble(trouble, trial, checks)
    panels[-1].set_xlabel("steps")
    handles = {label: line for line, label in zip(*age.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower left", ncols=4, handlelength=3.5)
    figure.tight_layout(rect=(0, 0.012 + 0.024 * math.ceil(len(handles) / 4), 1, 1))
    return figure


def _curve(axes: Any, trial: Trial) -> None:
    points = [(e.step, e.value) for e in trial.evaluations if math.isfinite(e.value)]
    if points:
        axes.plot(*zip(*points, strict=True), color="0", marker="o", markersize=3, linewidth=1.2)
        later = [value for _, value in points[1:]]
        later += [] if trial.target is None else [trial.target]
        if later and min(later) < max(later):  # the first, of untrained parameters, may lie outside
            margin = 0.08 * (max(later) - min(later))
            axes.set_ylim(min(later) - margin, max(later) + margin)
    if trial.target is not None:
        axes.axhline(trial.target, color="0.5", linewidth=0.8)
    line = "" if trial.target is None else f" (line: target {trial.target:g})"
    metric = (trial.metric or "metric").replace("_", " ")
    axes.set_title(f"validation: {metric}{line}", loc="left")


def _decades(axes: Any) -> None:
    """A logarithmic axis from 1 to a power of ten."""
    top = max(max(line.get_ydata()) for line in axes.lines)
    decades = max(1, math.ceil(math.log10(max(top, 1.0))))
    axes.set_yscale("log")
    axes.set_ylim(0.8, 1.3 * 10.0**decades)
    axes.set_yticks([10.0**i for i in range(0, decades + 1, max(1, decades // 3))])
    axes.minorticks_off()


def _lines(
    axes: Any,
    groups: Mapping[str, Sequence[Check]],
    value: Callable[[Check], float],
    lines: Sequence[tuple[Callable[[list[float]], float], float]],
) -> None:
    """A line a group and statistic, the first of which is marked and named."""
    for number, (group, own) in enumerate(groups.items()):
        for place, (of, width) in enumerate(lines):
            steps, values = factors.course(own, value, of)
            if not steps:
                continue
            style = _style(number, marked=place == 0) | {"linewidth": width}
            label = {"label": _NAMES.get(group, group)} if place == 0 else {}
            axes.plot(steps, values, **style, **label)


def _trouble(axes: Any, trial: Trial, checks: Sequence[Check]) -> None:
    """Failed decompositions and gradients left out, between two marks."""
    failed = _new_ones([(s, sum(c.failures for c in now)) for s, now in factors.by_step(checks)])
    skipped = _new_ones(counts(trial, SKIPPED))
    axes.set_title("failed decompositions (bars), gradients left out (crosses)", loc="left")
    if failed:
        width = max(1.0, 0.006 * max(c.step for c in checks))
        axes.bar([s for s, _ in failed], [n for _, n in failed], width=width, color="0.3")
        axes.yaxis.get_major_locator().set_params(integer=True)
    if skipped:
        axes.plot(*zip(*skipped, strict=True), "x", color="0", markersize=5)
    if not failed and not skipped:
        _say(axes, "none")
    else:
        axes.set_ylim(bottom=0)


def counts(trial: Trial, column: str) -> list[tuple[int, int]]:
    """Steps and a count that the submission logs at evaluations, as far as it is there."""
    try:
        header, rows, _ = files.read_csv(trial.path / "measurements.csv")
    except (files.Missing, files.Unreadable):
        return []
    if not {"global_step", column} <= set(header):
        return []
    found = []
    for _, row in rows:
        step, value = (files.number(row[header.index(n)]) for n in ("global_step", column))
        if step is not None and value is not None and math.isfinite(step) and math.isfinite(value):
            found.append((int(step), int(value)))
    return found


def _new_ones(counted: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of a count so far, where it grew and by how much."""
    found, before = [], 0
    for step, count in counted:
        if count > before:
            found.append((step, count - before))
        before = max(before, count)
    return found


def _say(axes: Any, text: str) -> None:
    axes.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center", va="center", color="0.4")
    axes.set_yticks([])


def _style(number: int, marked: bool = False) -> dict[str, Any]:
    style: dict[str, Any] = {
        "linestyle": STYLES[number % len(STYLES)],
        "color": _SHADES[number % len(_SHADES)],
        "linewidth": 1.3,
    }
    if marked:
        style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 3, "markevery": 0.12}
        style |= {"markerfacecolor": "white"}
    return style
