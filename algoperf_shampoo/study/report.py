"""One page for a set of runs: tables, figures, every run with its outcome and links to its log.

The page is self-contained: style and figures are in it, and it loads nothing. Its links to logs are
relative, so that it can be moved together with the runs.
"""

from __future__ import annotations

import base64
import html
import math
import os
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

from algoperf_shampoo.study import report_health
from algoperf_shampoo.study.figures import Drawn
from algoperf_shampoo.study.logs import Trial
from algoperf_shampoo.study.tables import Row, Table, cells, numbered, run_name

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #111; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
caption { text-align: left; padding-bottom: .5rem; max-width: min(60rem, 92vw); color: #444; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #ccc;
  vertical-align: top; }
th { border-bottom: 2px solid #111; }
figure { margin: 1.5rem 0; } figure img { width: 46rem; max-width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #444; }
.note { color: #8a3b00; } nav a { margin-right: 1rem; }
@media print { body { margin: 0; padding: 0; max-width: none; font-size: 11px; }
  h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: 8px; line-height: 1.3; width: 100%; }
  caption { max-width: 100%; font-size: 10px; } th, td { padding: 1px 4px; }
  .runs td:last-child a + a { display: none; }
  figure img { width: 100%; max-height: 9in; object-fit: contain; object-position: left; } }
"""
# What a log consists of, as far as it is there.
_FILES = (
    "eval_measurements.csv", "measurements.csv", "step_losses.csv", "factors.csv", "hparams.json",
    "run.json", "launches.json", "meta_data_0.json", "flags_0.json", "console.log",
)  # fmt: skip


def build(
    tables: Sequence[Table],
    drawn: Sequence[Drawn],
    trials: Sequence[Trial],
    root: Path,
    page: Path,
    title: str = "Runs",
) -> str:
    """The page as HTML.

    Args:
        tables: of the trials; those without a run are left out.
        drawn: figures, by the beginning of their names: ``<size>_``, ``<size>_health_``.
        page: where the page will lie; links are relative to it.
    """
    shown = [table for table in tables if any(row.runs for row in table.rows)]
    by_name = {run_name(trial.path, root): trial for trial in trials}
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{_summary(trials)}</p>",
    ]
    if not shown:
        parts.append("<p>No runs yet.</p>")
    links = [f'<a href="#{t.size}">{t.size}</a>' for t in shown]
    if len(links) > 1:
        parts.append(f"<nav>{''.join(links)}</nav>")
    for table in shown:
        parts.append(f'<h2 id="{table.size}">{table.size.capitalize()}</h2>')
        parts.append(_table(table))
        own = [figure for figure in drawn if figure.name.startswith(f"{table.size}_")]
        healths = [figure for figure in own if figure.name.startswith(f"{table.size}_health_")]
        parts += [_figure(figure) for figure in own if figure not in healths]
        if health := report_health.section(table, by_name):
            parts.append(f"<h3>The preconditioners' health, {table.size}</h3>")
            parts += [health, *map(_figure, healths)]
        parts.append(f"<h3>Every run, {table.size}</h3>")
        parts.append(_runs(table, by_name, page))
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _summary(trials: Sequence[Trial]) -> str:
    outcomes = [trial.outcome for trial in trials]
    counts = ", ".join(
        f"{outcomes.count(outcome)} {words}"
        for outcome, words in (
            ("hit", "reached their target"),
            ("miss", "spent their budget short of it"),
            ("all steps", "did all their steps, past the target"),
            ("unfinished", "are unfinished"),
            ("unknown", "do not say how they ended"),
        )
        if outcome in outcomes
    )
    hours = sum(filter(None, map(_wall_seconds, trials))) / 3600
    return html.escape(f"{len(trials)} runs: {counts or 'none'}; {hours:.2f} hours of wall time.")


def _table(table: Table) -> str:
    header, body = cells(table)
    lines = [f"<caption>{html.escape(table.caption)}</caption>", _line(header, "th")]
    for cell_texts, (number, row) in zip(body, numbered(table), strict=True):
        texts = [html.escape(text).replace(" ± ", "&nbsp;±&nbsp;") for text in cell_texts]
        if row.runs:
            place = texts.index(f"[{number}]")
            texts[place] = f'<a href="#{_anchor(table, number)}">[{number}]</a>'
        lines.append("<tr>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _runs(table: Table, by_name: dict[str, Trial], page: Path) -> str:
    header = ["Row", "Run", "Outcome", "Steps", "Time [s]", "Best", "Target", "Wall [s]", "Log"]
    lines = [_line(header, "th")]  # on paper the link to the folder is enough
    for number, row in numbered(table):
        for place, name in enumerate(row.runs):
            anchor = f' id="{_anchor(table, number)}"' if place == 0 else ""
            trial = by_name.get(name)
            texts = _run(row, number, name, trial, page)
            lines.append(f"<tr{anchor}>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    return '<div class="wide runs"><table>' + "\n".join(lines) + "</table></div>"


def _run(row: Row, number: int, name: str, trial: Trial | None, page: Path) -> list[str]:
    if trial is None:
        return [f"[{number}]", html.escape(name), *[""] * 7]
    finite = [e.value for e in trial.evaluations if math.isfinite(e.value)]
    # The nearest to the target, whichever way the metric runs: the hit's own for a run that hit.
    best = ""
    if finite and trial.target is not None:
        hit = [e.value for e in trial.evaluations if e.step == trial.steps_to_target]
        best = f"{hit[0] if hit else min(finite, key=lambda v: abs(v - (trial.target or 0.0))):.4f}"
    wall = _wall_seconds(trial)
    notes = "".join(f'<br><span class="note">{html.escape(hole)}</span>' for hole in trial.holes)
    seed = "" if trial.seed is None else f", seed {trial.seed}"
    return [
        f"[{number}]",
        f"{html.escape(row.workload)}, {html.escape(row.name)}{seed}{notes}",
        trial.outcome + (", diverged" if trial.diverged else ""),
        "" if trial.steps_to_target is None else str(trial.steps_to_target),
        "" if trial.time_to_target is None else f"{trial.time_to_target:.1f}",
        best,
        "" if trial.target is None else f"{trial.target:g}",
        "" if wall is None else f"{wall:.0f}",
        " ".join(_links(trial, page)),
    ]


def _links(trial: Trial, page: Path) -> list[str]:
    links = [_link(trial.path, page, "folder")]
    links += [_link(trial.path / n, page, n) for n in _FILES if (trial.path / n).is_file()]
    return links


def _link(target: Path, page: Path, text: str) -> str:
    relative = os.path.relpath(target.resolve(), page.parent.resolve())
    address = urllib.parse.quote(os.fsencode(relative.replace(os.sep, "/")))
    return f'<a href="{html.escape(address)}">{html.escape(text)}</a>'


def _figure(drawn: Drawn) -> str:
    data = base64.b64encode(drawn.files["svg"]).decode()
    caption = html.escape(drawn.caption)
    source = f"data:image/svg+xml;base64,{data}"
    return (
        f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _wall_seconds(trial: Trial) -> float | None:
    if not trial.evaluations:
        return None
    wall = trial.evaluations[-1].row.get("total_duration", math.nan)
    return wall if math.isfinite(wall) else None


def _anchor(table: Table, number: int) -> str:
    return f"{table.size}-{number}"


def _line(texts: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"
