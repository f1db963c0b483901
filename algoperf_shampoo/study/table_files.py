"""Tables as files: Markdown, LaTeX, CSV, JSON, and an index of the runs behind every cell."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from algoperf_shampoo import json_input
from algoperf_shampoo.harness import disk
from algoperf_shampoo.study import comparisons, logs
from algoperf_shampoo.study import tables as tables_of_paper
from algoperf_shampoo.study.tables import Row, Table, cells, numbered


def formats(tables: Sequence[Table], stem: Path, root: Path) -> dict[str, str]:
    """Every file of some tables by its name's ending; ``stem`` is where they will lie."""
    makers: dict[str, Callable[[], str]] = {
        "md": lambda: to_markdown(tables),
        "tex": lambda: to_latex(tables),
        "csv": lambda: to_csv(tables),
        "json": lambda: to_json(tables),
        "index.md": lambda: to_index(tables, stem.parent, root),
    }
    return {ending: make() for ending, make in makers.items()}


def stale(root: Path, listed: Path, write: bool) -> list[str]:
    """The committed files that are not what their runs give now; they are written anew if asked.

    ``listed``: a JSON list of {"table": "table1", "runs": [folders], "stem": where, no ending}.
    """
    found: list[str] = []
    for entry in json_input.read(listed, "list of tables"):
        trials = logs.find_trials([root / folder for folder in entry["runs"]])
        made = comparisons.annotate(tables_of_paper.TABLES[entry["table"]](trials, root))
        made = [replace(t, rows=[r for r in t.rows if r.runs or r.absent]) for t in made]
        made = [table for table in made if any(row.runs for row in table.rows)]
        stem = root / entry["stem"]
        own = formats(made, stem, root)
        before = len(found)
        for ending, content in own.items():
            path = Path(f"{stem}.{ending}")
            there = path.read_text(encoding="utf-8") if path.is_file() else None
            if there != content:
                found.append(path.relative_to(root).as_posix())
        if write and len(found) > before:
            write_files(stem, own)
    return found


def write_files(stem: Path, contents: dict[str, str]) -> None:
    """Write the files of a table by their endings: all of them or, should one fail, none.

    Raises:
        DiskError: one cannot be written; the table that was there is as it was.
    """
    disk.write_together({Path(f"{stem}.{end}"): text.encode() for end, text in contents.items()})


def to_markdown(tables: Sequence[Table]) -> str:
    """Tables as Markdown; each row's number leads to the runs listed below its table."""
    return "\n".join(_table_markdown(table) for table in tables)


def to_latex(tables: Sequence[Table]) -> str:
    """Tables as LaTeX ``tabular``, which needs no package; rows without runs are left out."""
    return "\n".join(_table_latex(table) for table in tables if any(r.runs for r in table.rows))


def to_csv(tables: Sequence[Table]) -> str:
    """All rows as CSV, seconds and full precision."""
    text = io.StringIO(newline="")
    of_row = "workload name label version ruleset framework hits ended".split()
    of_paper = "hits runs steps_mean steps_se time_min_mean time_min_se".split()
    compared = (
        "steps_ratio difference difference_corrected equivalence equivalence_corrected verdict"
    ).split()
    columns = ["size", *of_row, "steps_mean", "steps_se", "seconds_mean", "seconds_se"]
    columns += [f"paper_{name}" for name in of_paper] + ["differs"]
    columns += ["f_one_minus_beta2", "paper_f_one_minus_beta2"]
    columns += [f"reference_{name}" for name in compared]
    columns += ["paper_reference_steps_ratio", "paper_steps_ratio", "paper_time_ratio"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for table in tables:
        for row in table.rows:
            line: dict[str, Any] = {"size": table.size}
            line |= {name: getattr(row, name) for name in of_row}
            for name, estimate in (("steps", row.steps), ("seconds", row.seconds)):
                if estimate is not None:
                    line |= {f"{name}_mean": estimate.mean, f"{name}_se": estimate.error}
            line |= {f"paper_{name}": (row.paper or {}).get(name) for name in of_paper}
            line["f_one_minus_beta2"] = row.staleness
            line["paper_f_one_minus_beta2"] = row.paper_staleness
            line["differs"] = "; ".join(difference.text() for difference in row.differs)
            if row.comparison is not None:
                line |= {f"reference_{n}": getattr(row.comparison, n) for n in compared}
            line["paper_reference_steps_ratio"] = row.paper_steps_ratio
            line["paper_steps_ratio"], line["paper_time_ratio"] = paper_ratios(table, row)
            writer.writerow(line)
    return text.getvalue()


def to_json(tables: Sequence[Table]) -> str:
    """Everything, the run folders of each row among it."""
    content = [asdict(table) for table in tables]
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def to_index(tables: Sequence[Table], folder: Path, root: Path) -> str:
    """For every row its runs, with their steps and links to the folders, relative to ``folder``."""
    lines = ["# Runs behind each row", ""]
    for table in tables:
        for number, row in numbered(table):
            if not row.runs:
                continue
            lines += [f"## {table.size} [{number}]: {row.workload}, {row.name}", ""]
            counted = f"{row.hits} of {row.ended} hit; steps: "
            steps = ", ".join("miss" if value is None else str(value) for value in row.values)
            lines += [counted + (steps or "none"), ""]
            for run in row.runs:
                there = os.path.relpath(root / run, root / folder)
                lines.append(f"- [{_escaped(run)}](<{there}>)")
            lines += [f"- {_escaped(note)}" for note in row.notes] + [""]
    return "\n".join(lines)


def paper_ratios(table: Table, row: Row) -> tuple[float | None, float | None]:
    """Steps and time over the paper's, at full size: a mini's are not to be compared."""
    if table.size != "full" or row.paper is None or row.paper["hits"] is None:
        return None, None
    steps = row.steps.mean / row.paper["steps_mean"] if row.steps else None
    time = row.seconds.mean / 60 / row.paper["time_min_mean"] if row.seconds else None
    return steps, time


def _table_markdown(table: Table) -> str:
    header, body = cells(table)
    more = _more_columns(table)
    header = [*header, *more[0]]
    lines = [f"**{table.caption}**", "", _pipe(header), _pipe(["---"] * len(header))]
    lines += [_pipe([*row, *extra]) for row, extra in zip(body, more[1:], strict=True)]
    for paragraph in [comparisons.rule(table), *comparisons.pooled_lines(table)]:
        if paragraph:
            lines += ["", paragraph]
    implied = [(row, row.paper_implies) for row in table.rows if row.paper_implies]
    if implied:
        lines += ["", "What the paper's own figures imply against its grafting row:", ""]
        for row, text in implied:
            name = (row.paper or {})["name"]
            lines.append(f"- {row.workload}, {name}: {text}")
    listed = [(number, row) for number, row in numbered(table) if row.runs]
    if listed:
        lines += ["", "Runs behind each row:", ""]
    for number, row in listed:
        lines.append(f"- [{number}] {row.workload}, {row.label}: " + ", ".join(row.runs))
        lines += [f"  - {note}" for note in row.notes]
    return "\n".join(lines) + "\n"


def _more_columns(table: Table) -> list[list[str]]:
    """Header and cells of the comparisons: of grafting's steps, and over the paper's figures."""
    header = ["of grafting's steps", "the paper's", "p (corrected)"]
    if table.size == "full":
        header += ["steps / paper's", "time / paper's"]
    made = [header]
    for row in table.rows:
        one = row.comparison
        line = [
            _ratio(one.steps_ratio if one else None),
            _ratio(row.paper_steps_ratio),
            f"{one.difference:.2g} ({one.difference_corrected:.2g})" if one else "",
        ]
        if table.size == "full":
            line += [_ratio(value) for value in paper_ratios(table, row)]
        made.append(line)
    return made


def _table_latex(table: Table) -> str:
    header, body = cells(table)
    more = _more_columns(table)
    keep = [0, 1, 2, *range(4, len(header))]  # all but the number of the row's runs
    columns = [header[i] for i in keep] + more[0]
    lines = [f"% {table.caption}", rf"\begin{{tabular}}{{ll{'r' * (len(columns) - 2)}}}", r"\hline"]
    lines += [_tex_line(columns), r"\hline"]
    for row, texts, extra in zip(table.rows, body, more[1:], strict=True):
        if row.runs:
            lines.append(_tex_line([*(texts[i] for i in keep), *extra]))
    lines += [r"\hline", r"\end{tabular}"]
    rule = comparisons.rule(table)
    if rule:
        lines.append(rf"\par\smallskip\noindent {_tex(rule)}")
    return "\n".join(lines) + "\n"


def _tex_line(texts: Sequence[str]) -> str:
    return " & ".join(_tex(text) for text in texts) + r" \\"


_TEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    "*": r"$^*$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _pipe(texts: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(text) for text in texts) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")
