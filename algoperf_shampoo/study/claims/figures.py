"""Figures of a study of claims, on the axes of the paper's, each caption saying what ours are.

The paper's Figures 1 to 7 are Imagewoof, 100 epochs; these are the minis.
"""

from __future__ import annotations

import json
import math
import statistics as stat
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from algoperf_shampoo.harness.hparams import F_KEY, TAU_KEY
from algoperf_shampoo.study.claims.file import Curves
from algoperf_shampoo.study.claims.results import Outcome, Run
from algoperf_shampoo.study.claims.statistics import KINDS, OF_KINDS, loss_curve, shares_between
from algoperf_shampoo.study.claims.tuning import Choice
from algoperf_shampoo.study.figures import (
    DPI,
    LATER,
    MARKERS,
    SETTINGS,
    STYLES,
    WIDTH,
    Drawn,
    saved,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RATE = "learning_rate"
_WINDOW = 25
"""Steps over which a curve is averaged."""
_MARKED = 4
"""Of the places of a curve every so manieth has a mark, each line's beginning at another."""
_ABREAST = 2
"""Names of lines beside each other below the panels."""
_TICKS = 4
"""Labels of learning rates that a panel has room for."""


def draw(found: Outcome, name: str = "claims") -> list[Drawn]:
    """Loss against learning rate, refreshes and losses against steps, as far as there are runs;
    their names begin with ``name``.

    Raises:
        ModuleNotFoundError: no matplotlib.
    """
    import matplotlib

    drawn, declared = [], found.declared
    with matplotlib.rc_context(SETTINGS):
        for kind, figure, caption in (
            ("rates", _tuned(found) if found.choices else _rates(found), _RATES),
            ("refreshes", _refreshes(found), _REFRESHES),
            ("kinds", _kinds(found), _OF_KINDS),
            *((one.name, _curves(found, one), _CURVES.format(one.of)) for one in declared.curves),
        ):
            if figure is not None:
                quick = " Quick: few seeds and steps, no verdicts." if found.quick else ""
                drawn.append(saved(figure, f"{name}_{kind}", caption + quick))
    return drawn


_RATES = (
    "Mean training loss of the last tenth of the steps against the learning rate, the axes of the "
    "paper's Figure 2 (there: Imagewoof, final loss after 100 epochs; here: the minis). A mark is "
    "a run, the line the mean over seeds; a run that diverged is left out. Where rates were tuned, "
    "the runs are those of the tuning seeds, and a mark their mean; means far above every arm's "
    "best are left out."
)
_REFRESHES = (
    "Eigendecompositions over checks, of all factors between two evaluations, the axes of the "
    "paper's Figure 4 (there: Imagewoof ViT, tau = 0.1, F = 1; here: the minis). Mean over seeds."
)


_OF_KINDS = (
    "Eigendecompositions over checks between two evaluations by kind of factor, the axes of the "
    "paper's Figures 4 and 7 (there: Imagewoof; here: the minis): one_dim of 1-D blocks (A), left "
    "and right of the first and the last dimension of others (L, R). Mean over seeds."
)
_CURVES = (
    "Training loss, mean of 25 steps, against the steps, on the minis; beside the paper's {} "
    "(there: Imagewoof). Mean over seeds; runs that diverged are left out. The axis is that of "
    "what comes after the first tenth of the steps; before it lines may lie outside."
)


def families(runs: Sequence[Run]) -> dict[str, dict[float, list[Run]]]:
    """Runs that differ in the learning rate alone: by their name, and then by the rate.

    Families of one rate are left out.
    """
    found: dict[tuple[str, str], dict[float, list[Run]]] = {}
    for run in runs:
        rest = {name: value for name, value in run.point.items() if name != _RATE}
        key = run.variant, json.dumps(rest, sort_keys=True)
        found.setdefault(key, {}).setdefault(run.point[_RATE], []).append(run)
    named = {}
    for (variant, others), by_rate in found.items():
        if len(by_rate) > 1:
            point = json.loads(others)
            words = [
                f"{short} = {point[name]:g}"
                for short, name in (("F", F_KEY), ("tau", TAU_KEY))
                if name in point
            ]
            named[variant + (f" ({', '.join(words)})" if words else "")] = by_rate
    return named


def _rates(found: Outcome) -> Figure | None:
    lines = families([run for run in found.runs if "loss" in run.values])
    if not lines:
        return None
    figure, grid = _panels(found.minis, len(lines))
    for mini, axes in zip(found.minis, grid, strict=True):
        for number, (name, by_rate) in enumerate(lines.items()):
            points = {
                rate: [r.values["loss"] for r in runs if r.mini == mini]
                for rate, runs in sorted(by_rate.items())
            }
            finite = {rate: [v for v in vs if math.isfinite(v)] for rate, vs in points.items()}
            _line(axes, number, name, finite)
        _rate_axis(axes, [rate for by_rate in lines.values() for rate in by_rate])
    grid[0].set_ylabel("training loss, last tenth")
    return _with_legend(figure, grid[0], len(lines))


def _tuned(found: Outcome) -> Figure:
    """The grids that rates were chosen from."""
    arms = list(dict.fromkeys(arm for arm, _ in found.choices))
    figure, grid = _panels(found.minis, len(arms))
    for mini, axes in zip(found.minis, grid, strict=True):
        choices = {a: c for (a, m), c in found.choices.items() if m == mini}
        most = _most(choices.values())
        for number, arm in enumerate(arms):
            losses = choices[arm].losses if arm in choices else {}
            points = {r: [v] if v <= most else [] for r, v in losses.items()}
            _line(axes, number, arm, points)
        _rate_axis(axes, [rate for choice in found.choices.values() for rate in choice.losses])
    grid[0].set_ylabel("training loss, last tenth")
    return _with_legend(figure, grid[0], len(arms))


def _most(choices: Iterable[Choice]) -> float:
    """The largest loss that has a place: half more above the best of all than the arm has whose
    best is the worst."""
    bests = [best for c in choices if math.isfinite(best := min(c.losses.values()))]
    return max(bests) + 0.5 * (max(bests) - min(bests)) if bests else math.inf


def _refreshes(found: Outcome) -> Figure | None:
    by_arm: dict[str, list[Run]] = {}
    for run in found.runs:
        if run.point.get(TAU_KEY):
            by_arm.setdefault(run.arm, []).append(run)
    if not by_arm:
        return None
    figure, grid = _panels(found.minis, len(by_arm))
    for mini, axes in zip(found.minis, grid, strict=True):
        for number, (arm, runs) in enumerate(by_arm.items()):
            shares: dict[float, list[float]] = {}
            for run in (r for r in runs if r.mini == mini and not r.diverged):
                for step, share in shares_between(run.folder).items():
                    shares.setdefault(step, []).append(share)
            _line(axes, number, arm, shares)
        _share_axis(axes)
    grid[0].set_ylabel("eigendecompositions / checks")
    return _with_legend(figure, grid[0], len(by_arm))


def _kinds(found: Outcome) -> Figure | None:
    """Of the arms that a claim on kinds of factors is about."""
    runs = [run for run in found.runs if set(run.values) & set(OF_KINDS)]
    if not runs:
        return None
    figure, grid = _panels(found.minis, len(KINDS))
    for mini, axes in zip(found.minis, grid, strict=True):
        for number, kind in enumerate(KINDS):
            shares: dict[float, list[float]] = {}
            for run in (r for r in runs if r.mini == mini and not r.diverged):
                for step, share in shares_between(run.folder, kind).items():
                    shares.setdefault(step, []).append(share)
            _line(axes, number, kind, shares)
        _share_axis(axes)
    grid[0].set_ylabel("eigendecompositions / checks")
    return _with_legend(figure, grid[0], len(KINDS))


def _curves(found: Outcome, wanted: Curves) -> Figure | None:
    runs = [run for run in found.runs if run.arm in wanted.arms]
    if not runs:
        return None
    figure, grid = _panels(found.minis, len(wanted.arms))
    for mini, axes in zip(found.minis, grid, strict=True):
        for number, arm in enumerate(wanted.arms):
            losses: dict[float, list[float]] = {}
            for run in (r for r in runs if (r.arm, r.mini) == (arm, mini) and not r.diverged):
                for step, loss in loss_curve(run.folder, _WINDOW).items():
                    losses.setdefault(step, []).append(loss)
            _line(axes, number, arm, losses, each=False)
        _later_axis(axes)
        axes.set_xlabel("steps")
    grid[0].set_ylabel("training loss")
    return _with_legend(figure, grid[0], len(wanted.arms))


def _line(
    axes: Any, number: int, name: str, points: Mapping[float, Sequence[float]], each: bool = True
) -> None:
    """The mean over runs at each place, and with ``each`` a small mark for each run.

    Without ``each`` places are many, and some alone are marked.
    """
    known = {place: values for place, values in points.items() if values}
    style: dict[str, Any] = {"color": "0.0" if number % 2 == 0 else "0.45"}
    marker = MARKERS[number % len(MARKERS)]
    face = ("white", style["color"], "0.8")[number // len(MARKERS) % 3]
    axes.plot(
        list(known), [stat.fmean(values) for values in known.values()], marker=marker,
        markersize=4, markerfacecolor=face, linestyle=STYLES[number % len(STYLES)],
        markevery=None if each else (number % _MARKED, _MARKED),
        linewidth=1.2, label=name, clip_on=not (each and known), **style,
    )  # fmt: skip
    several = {place: values for place, values in known.items() if each and len(values) > 1}
    for place, values in several.items():
        axes.plot(
            [place] * len(values), values, marker, markersize=2, linestyle="none", clip_on=False,
            **style,
        )  # fmt: skip


def _rate_axis(axes: Any, rates: Sequence[float]) -> None:
    """Logarithmic; a tick at each rate while they have room, else at powers of ten."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    shown = sorted(set(rates))
    if len(shown) <= _TICKS:
        axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("learning rate")


def _share_axis(axes: Any) -> None:
    axes.set_xlabel("steps")
    axes.set_ylim(0, 1)


def _later_axis(axes: Any) -> None:
    """The vertical axis of what comes after the first steep part of the curves."""
    points = [point for line in axes.get_lines() for point in line.get_xydata()]
    last = max((step for step, _ in points), default=0.0)
    later = [value for step, value in points if step > LATER * last]
    if later and min(later) < max(later):
        margin = 0.06 * (max(later) - min(later))
        axes.set_ylim(min(later) - margin, max(later) + margin)


def _panels(minis: Sequence[str], lines: int) -> tuple[Figure, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 2.4 + _legend_height(lines)), dpi=DPI)
    grid = figure.subplots(1, len(minis), squeeze=False)[0]
    for mini, axes in zip(minis, grid, strict=True):
        axes.set_title(mini, loc="left")
    return figure, grid


def _legend_height(lines: int) -> float:
    """Inches below the panels."""
    return 0.18 * -(-lines // _ABREAST) + 0.05


def _with_legend(figure: Figure, axes: Any, lines: int) -> Figure:
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="lower left", ncols=_ABREAST, handlelength=4)
    figure.tight_layout(rect=(0, _legend_height(lines) / figure.get_figheight(), 1, 1))
    return figure
