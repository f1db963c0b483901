"""A table for a terminal: within a width, with the folders of its runs."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import PurePosixPath

from algoperf_shampoo.study import comparisons
from algoperf_shampoo.study.tables import Row, Table, cells, numbered, shown_staleness

WIDEST, NARROWEST = 100, 80
_GAP, _INDENT = "  ", " " * 6


def terminal_width() -> int:
    """Columns to fill: the terminal's, between 80 and 100; 100 where there is none."""
    return max(NARROWEST, min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns))


def render(table: Table, width: int = WIDEST) -> str:
    """The rows that have runs, under their workloads, with settings, notes and run folders.

    The paper's figures are columns where ``width`` has room for them, else lines of their own. Rows
    without runs are named in one line.
    """
    listed = [(number, row) for number, row in numbered(table) if row.runs]
    if not listed:
        return f"{table.caption.split(':')[0]}: no runs yet"
    header, body = cells(table)
    texts = [line for line, (_, row) in zip(body, numbered(table), strict=True) if row.runs]
    titles = [f"[{number}] {row.title}" for number, row in listed]
    # Hits, steps, time of ours; then the paper's, whose name is in the settings' line.
    ours = [line[4:7] for line in texts]
    papers = [line[9:12] for line in texts]
    heads = [header[4:7], ["paper's hits", *header[10:12]]]
    columns = _columns(["", *heads[0], *heads[1]], titles, ours, papers)
    beside = any(row.paper for _, row in listed) and sum(columns) + 2 * (len(columns) - 1) <= width
    count = len(columns) if beside else 4
    lines = [*textwrap.wrap(table.caption, width), ""]
    lines.append(_line(["", *heads[0], *heads[1]][:count], columns))
    workload = None
    for title, own, paper, (_, row) in zip(titles, ours, papers, listed, strict=True):
        if row.workload != workload:
            workload = row.workload
            lines.append(workload)
        lines.append(_line([title, *own, *paper][:count], columns))
        lines += _below(row, paper, beside, width)
    missing: dict[str, list[str]] = {}
    absent: dict[str, list[str]] = {}
    for row in table.rows:
        if row.absent:
            absent.setdefault(row.absent, []).append(f"{row.workload}, {(row.paper or {})['name']}")
        elif not row.runs:
            missing.setdefault(row.workload, []).append(row.title)
    if missing:
        text = "; ".join(f"{name}: {', '.join(titles)}" for name, titles in missing.items())
        lines += ["", *_wrapped(f"no runs yet: {text}", width, _INDENT)]
    for reason, names in absent.items():
        lines += _wrapped(f"{reason}: {'; '.join(names)}", width, _INDENT)
    for paragraph in [comparisons.rule(table), *comparisons.pooled_lines(table)]:
        if paragraph:
            lines += ["", *_wrapped(paragraph, width, _INDENT)]
    return "\n".join([*lines, "", *_legend(listed, width)])


def _below(row: Row, paper: list[str], beside: bool, width: int) -> list[str]:
    lines = []
    settings = ", ".join(row.settings)
    if row.staleness is not None:
        settings += f"; F(1-beta2) = {shown_staleness(row.staleness)}"
        if row.paper_staleness is not None:
            settings += f", the paper's {shown_staleness(row.paper_staleness)}"
    if settings:
        lines += _wrapped(_INDENT + settings, width, _INDENT)
    if row.paper and not beside:
        text = f"paper, {row.paper['name']}: {paper[0]}, {paper[1]} steps, {paper[2]} min"
        lines += _wrapped(_INDENT + text, width, _INDENT)
    for note in row.notes:
        lines += _wrapped(_INDENT + note, width, _INDENT)
    return lines


def _legend(listed: Sequence[tuple[int, Row]], width: int) -> list[str]:
    """Where each row's runs are, seeds of one study set in braces, as a shell reads them."""
    folders = [PurePosixPath(run).parents[3].as_posix() for _, row in listed for run in row.runs]
    common = _common(folders)
    lines = [f"runs{f', below {common}' if common else ''}:"]
    for number, row in listed:
        grouped: dict[tuple[str, str], list[str]] = {}
        for run in row.runs:
            path = PurePosixPath(run)
            label, inside = path.parents[2], path.relative_to(path.parents[1])
            shown = label.relative_to(common) if common else label
            grouped.setdefault((shown.as_posix(), inside.as_posix()), []).append(
                path.parents[1].name
            )
        for (label_text, inside_text), studies in grouped.items():
            text = f"[{number}] {label_text}/{_braces(studies)}/{inside_text}"
            lines += _wrapped(text, width, _INDENT)
    return lines


def _braces(studies: list[str]) -> str:
    if len(studies) == 1:
        return studies[0]
    if all(study.startswith("study_") for study in studies):
        return "study_{" + ",".join(study.removeprefix("study_") for study in studies) + "}"
    return "{" + ",".join(studies) + "}"


def _common(folders: Sequence[str]) -> str:
    """The longest folder that all lie in or are; empty if there is none."""
    parts = [PurePosixPath(folder).parts for folder in folders]
    shared = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return PurePosixPath(*shared).as_posix() if shared else ""


def _columns(
    header: Sequence[str], titles: Sequence[str], ours: list[list[str]], papers: list[list[str]]
) -> list[int]:
    rows = [[t, *own, *paper] for t, own, paper in zip(titles, ours, papers, strict=True)]
    return [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(text.ljust(w) for text, w in zip(texts, widths, strict=False)).rstrip()


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
