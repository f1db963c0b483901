"""What a table's rows say about each other: ratios, and the tests of :mod:`.significance`.

A row of the paper's that has runs is compared with the reference row (``shampoo_grafting``) of its
workload, version and terms (target, budget, data). Beside it stands what the paper's summaries
imply on the same two rows. Settings that several workloads have are compared once more over all of
them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from algoperf_shampoo.study import paper_summary, significance
from algoperf_shampoo.study.provenance import NONE
from algoperf_shampoo.study.tables import Comparison, Pooled, Row, Table

MARKS = {"fewer": "*", "more": "†", "equivalent": "=", "undecided": ""}


@dataclass(frozen=True)
class _Pair:
    """A row with runs, and the reference row it is compared with, by their places in a table."""

    own: int
    reference: int


def annotate(tables: Sequence[Table]) -> list[Table]:
    """The tables with comparisons and ratios in their rows, and settings over workloads."""
    return [_annotate(table) for table in tables]


def rule(table: Table) -> str:
    """One paragraph: by which rule the marks of a table were made, and with how many tests."""
    made = [row.comparison for row in table.rows if row.comparison is not None]
    if not made:
        return ""
    tests = 2 * len(made)
    text = (
        f"Marks: steps of the runs (misses rank worst) against {significance.REFERENCE} on the "
        f"same workload; exact rank-sum tests of {len(made)} differences and, within a factor of "
        f"{1 + significance.MARGIN:g}, of as many equivalences: {tests} tests, corrected together "
        f"by Holm at {significance.ALPHA:g}. {MARKS['fewer']} fewer steps, {MARKS['more']} more, "
        f"{MARKS['equivalent']} equivalent, none: undecided."
    )
    hopeless = sum(not comparison.decidable for comparison in made)
    if hopeless:
        least = min(comparison.least for comparison in made)
        text += (
            f" With these numbers of runs {hopeless} of {len(made)} cannot be decided at all: the "
            f"smallest p of a difference is {least:.2g}, {min(1.0, least * tests):.2g} after the "
            "correction."
        )
    return text


def pooled_lines(table: Table) -> list[str]:
    """A line for each setting over its workloads."""
    if not table.pooled:
        return []
    tests = 2 * len(table.pooled)
    lines = [f"Over workloads (rank sums added, permuted within each; {tests} tests, Holm):"]
    for one in table.pooled:
        lines.append(
            f"{one.name}: {one.verdict}{' *' if one.verdict == 'fewer' else ''}; {one.runs} runs "
            f"against {one.reference_runs} on {', '.join(one.workloads)}; difference p = "
            f"{one.difference:.2g}, corrected {one.difference_corrected:.2g}; equivalence "
            f"p = {one.equivalence:.2g}, corrected {one.equivalence_corrected:.2g}"
        )
    return lines


def _annotate(table: Table) -> Table:
    rows = [_beside_the_paper(row, table) for row in table.rows]
    pairs = [pair for pair in _pairs(rows) if rows[pair.own].values and rows[pair.reference].values]
    tests = [significance.test([_stratum(rows, pair)]) for pair in pairs]
    for pair, one, verdict in zip(pairs, tests, significance.decide(tests), strict=True):
        own, reference = rows[pair.own], rows[pair.reference]
        ratio = own.steps.mean / reference.steps.mean if own.steps and reference.steps else None
        rows[pair.own] = replace(
            own,
            notes=[*own.notes, *_made_otherwise(own, reference)],
            comparison=Comparison(
                reference=reference.name,
                steps_ratio=ratio,
                difference=one.difference,
                difference_corrected=verdict.difference,
                equivalence=one.equivalence,
                equivalence_corrected=verdict.equivalence,
                verdict=verdict.verdict,
                mark=MARKS[verdict.verdict],
                least=one.least,
                decidable=verdict.decidable,
            ),
        )
    return replace(table, rows=rows, pooled=_pooled(rows, pairs))


def _made_otherwise(row: Row, reference: Row) -> list[str]:
    """A line where a row and its reference were not made by the same code on the same machine."""
    names = dict.fromkeys([*row.made_by, *reference.made_by])
    differ = [
        what
        for what in names
        if what != "submission source"  # each variant has its own
        and row.made_by.get(what, {}).keys() != reference.made_by.get(what, {}).keys()
    ]
    if not differ:
        return []
    return [f"compared with {significance.REFERENCE}, whose runs differ in {', '.join(differ)}"]


def _beside_the_paper(row: Row, table: Table) -> Row:
    """The row with what the paper's own figures say about it."""
    if row.paper is None:
        return row
    of = [r.paper for r in table.rows if r.paper and r.paper["variant"] == significance.REFERENCE]
    reference = next((entry for entry in of if entry["workload"] == row.paper["workload"]), None)
    if reference is None or row.paper is reference:
        return row
    both = row.paper["steps_mean"] is not None and reference["steps_mean"] is not None
    return replace(
        row,
        paper_implies=paper_summary.compare(row.paper, reference).text,
        paper_steps_ratio=row.paper["steps_mean"] / reference["steps_mean"] if both else None,
    )


def _pairs(rows: Sequence[Row]) -> list[_Pair]:
    """The paper's rows that have runs, with their reference rows; ours before a published one."""
    found = []
    for place, row in enumerate(rows):
        if not row.runs or row.paper is None or row.paper["variant"] == significance.REFERENCE:
            continue
        fitting = [i for i, r in enumerate(rows) if _is_reference(r, row)]
        fitting.sort(key=lambda i: not rows[i].label.startswith(significance.REFERENCE))
        found += [_Pair(place, reference) for reference in fitting[:1]]
    return found


def _is_reference(row: Row, of: Row) -> bool:
    return (
        bool(row.runs)
        and row.paper is not None
        and row.paper["variant"] == significance.REFERENCE
        and (row.workload, row.version) == (of.workload, of.version)
        and _same_terms(row.terms, of.terms)
    )


def _same_terms(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether two rows have one target, budget and data, as far as both state them."""
    return all(x == y or NONE in (x, y) for x, y in zip(a, b, strict=False))


def _stratum(rows: Sequence[Row], pair: _Pair) -> significance.Stratum:
    a, b = (
        [significance.MISS if value is None else float(value) for value in rows[place].values]
        for place in (pair.own, pair.reference)
    )
    return a, b


def _pooled(rows: Sequence[Row], pairs: Sequence[_Pair]) -> list[Pooled]:
    """Each of the paper's settings over all workloads on which it and the reference have runs."""
    by_setting: dict[str, list[_Pair]] = {}
    for pair in pairs:
        entry = rows[pair.own].paper
        if entry is not None:
            by_setting.setdefault(entry["name"], []).append(pair)
    several = {}
    for name, group in by_setting.items():
        workloads = {rows[pair.own].workload for pair in group}
        if len(workloads) == len(group) > 1:  # one row a workload: nothing is counted twice
            several[name] = group
    tests = [significance.test([_stratum(rows, p) for p in group]) for group in several.values()]
    made = []
    for (name, group), one, verdict in zip(
        several.items(), tests, significance.decide(tests), strict=True
    ):
        made.append(
            Pooled(
                name=name,
                workloads=[rows[pair.own].workload for pair in group],
                runs=sum(len(rows[pair.own].values) for pair in group),
                reference_runs=sum(len(rows[pair.reference].values) for pair in group),
                difference=one.difference,
                difference_corrected=verdict.difference,
                equivalence=one.equivalence,
                equivalence_corrected=verdict.equivalence,
                verdict=verdict.verdict,
            )
        )
    return made
