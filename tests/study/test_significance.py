"""The rule for marks: exact tests, against enumeration and known values, and tables with them."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from pathlib import Path

import pytest
from scipy import stats

from algoperf_shampoo.study import (
    comparisons,
    logs,
    paper_summary,
    significance,
    table_files,
    table_text,
    tables,
)
from tests.study.test_logs import made_trial, write_record

ROOT = Path(__file__).parents[2]
MISS = significance.MISS


def enumerated(a: list[float], b: list[float]) -> tuple[float, float]:
    """P(rank sum of a <= seen) and P(>= seen) over all ways to choose which runs are a's."""
    ranks = stats.rankdata([*a, *b])
    sums = [sum(ranks[list(c)]) for c in itertools.combinations(range(len(ranks)), len(a))]
    seen = sum(ranks[: len(a)])
    low = sum(value <= seen + 1e-9 for value in sums)
    return low / len(sums), sum(value >= seen - 1e-9 for value in sums) / len(sums)


def test_p_values_are_those_of_enumeration_with_ties_and_misses():
    draw = random.Random(4)
    for _ in range(60):
        a, b = ([draw.choice([1, 2, 3, 4, 5, MISS]) for _ in range(n)] for n in (3, 5))
        low, high = enumerated(a, b)
        found = significance.test([(a, b)])
        assert found.difference == pytest.approx(min(1, 2 * min(low, high)), abs=1e-12)
        assert found.fewer == pytest.approx(low, abs=1e-12)


def test_p_values_without_ties_are_scipys():
    a, b = [3.0, 1.0, 7.0, 2.5], [4.0, 9.0, 8.0, 6.0, 5.0]
    exact = stats.mannwhitneyu(a, b, method="exact").pvalue
    assert significance.test([(a, b)]).difference == pytest.approx(exact)


def test_complete_separation_reaches_the_smallest_p():
    found = significance.test([([1, 2, 3, 4, 5], [6, 7, 8, MISS, MISS])])
    assert found.difference == found.least == pytest.approx(2 / math.comb(10, 5))
    both = significance.test([([1, 2], [3, 4]), ([1, 2, 3], [4, MISS, MISS])])
    assert both.difference == both.least == pytest.approx(2 / (6 * 20))


def test_workloads_are_permuted_within_not_across():
    """Steps of two workloads differ by far: pooled as they are they would tell nothing."""
    strata = [([10, 11], [12, 13]), ([10_000, 10_001], [10_002, 10_003])]
    assert significance.test(strata).fewer == pytest.approx(1 / 36)
    mixed = significance.test([(strata[0][0] + strata[1][0], strata[0][1] + strata[1][1])])
    assert mixed.fewer > 0.15


def test_all_misses_are_alike_and_equivalent_to_nothing():
    found = significance.test([([MISS] * 5, [MISS] * 5)])
    assert found.difference == 1 and found.equivalence == 1


def test_equivalence_needs_a_margin_and_many_runs():
    near, base = [1000 + i for i in range(8)], [1004 + i for i in range(8)]
    assert significance.test([(near, base)]).equivalence == pytest.approx(1 / math.comb(16, 8))
    far = [1200 + i for i in range(8)]
    assert significance.test([(far, base)]).equivalence == pytest.approx(1)
    assert significance.test([(near[:2], base[:2])]).equivalence == pytest.approx(1 / 6)
    half_missed = near[:4] + [MISS] * 4
    assert significance.test([(half_missed, base)]).equivalence > 0.05


def test_holm_against_a_hand_computed_case():
    assert significance.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert significance.holm([0.5, 0.9]) == [1.0, 1.0]


def test_corrected_error_rate_of_a_table_without_differences():
    """Under the null no more than alpha of whole tables has a mark for a difference."""
    draw = random.Random(7)
    marked = 0
    for _ in range(200):
        reference = [draw.random() for _ in range(5)]
        tests = [
            significance.test([([draw.random() for _ in range(5)], reference)]) for _ in range(3)
        ]
        marked += any(v.verdict in ("fewer", "more") for v in significance.decide(tests))
    assert marked <= 200 * significance.ALPHA


def test_a_true_difference_is_marked_and_its_direction_is_right():
    better, worse = [1, 2, 3, 4, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17]
    one = significance.test([(better, worse)])
    assert significance.decide([one])[0].verdict == "fewer"
    assert significance.decide([significance.test([(worse, better)])])[0].verdict == "more"
    few = significance.decide([significance.test([([1, 2], [3, 4])])])[0]
    assert few.verdict == "undecided" and not few.decidable


@pytest.mark.parametrize("counts", [(2, 5, 5, 5), (3, 5, 2, 5), (0, 4, 4, 4), (5, 5, 5, 5)])
def test_fisher_is_scipys(counts):
    hits, runs, other_hits, other_runs = counts
    table = [[hits, runs - hits], [other_hits, other_runs - other_hits]]
    assert significance.fisher(*counts) == pytest.approx(stats.fisher_exact(table)[1])


def paper_rows() -> dict[tuple[str, str], dict]:
    rows = tables.read_paper(ROOT / "results" / "paper" / "table3.json")
    return {(row["workload"], row["name"]): row for row in rows}


def test_what_the_papers_summaries_imply():
    rows = paper_rows()
    grafting = {w: rows[w, "Adam grafting (F = 100)"] for w in ("fastmri", "imagenet_vit", "ogbg")}
    fastmri = paper_summary.compare(rows["fastmri", "EShampoo (F = 100)"], grafting["fastmri"])
    assert "is at most 2800, the other's least at least 3974" in fastmri.text
    assert fastmri.p == pytest.approx(2 / math.comb(10, 5)) and fastmri.fisher == 1
    vit = paper_summary.compare(
        rows["imagenet_vit", "EShampoo (F = 100)"], grafting["imagenet_vit"]
    )
    assert vit.p is None and vit.text == "not possible: n = 1"
    ogbg = paper_summary.compare(rows["ogbg", "EShampoo (tau = 0.1, F = 50)"], grafting["ogbg"])
    assert (
        ogbg.fisher == pytest.approx(1 / 6) and "hits 5/5 against 2/5, Fisher p = 0.17" in ogbg.text
    )
    missing = paper_summary.compare(rows["ogbg", "EShampoo (F = 1)"], grafting["ogbg"])
    assert missing.text == "not possible: no runs"
    wide = {**grafting["fastmri"], "steps_se": 700}
    met = paper_summary.compare(wide, grafting["fastmri"])
    assert met.p is None and "the ranges of steps that the summaries allow meet" in met.text


def test_no_run_is_further_from_the_mean_than_the_range_says():
    draw = random.Random(3)
    for n in (2, 3, 5):
        values = [draw.lognormvariate(0, 2) for _ in range(n)]
        estimate = tables.Estimate.of(values)
        entry = {"hits": n, "steps_mean": estimate.mean, "steps_se": estimate.error}
        low, high = paper_summary.steps_range(entry)
        assert low <= min(values) + 1e-9 and max(values) - 1e-9 <= high
    at_most = tables.Estimate.of([1.0, 1.0, 1.0, 5.0])  # the bound is met
    entry = {"hits": 4, "steps_mean": at_most.mean, "steps_se": at_most.error}
    assert paper_summary.steps_range(entry)[1] == pytest.approx(5.0)


POINTS = {
    name: json.loads((ROOT / "search_spaces" / "mini" / f"{name}.json").read_text())
    for name in ("shampoo_grafting", "eshampoo_fixed", "eshampoo_adaptive")
}


def mini_runs(folder: Path, label: str, steps: list[int | None], workload="fastmri", **changed):
    """Runs that reach 0.5 at these steps (None: never), at a variant's mini point but for some."""
    variant = next(name for name in POINTS if label.startswith(name))
    point = POINTS[variant]
    for seed, hit in enumerate(steps, start=1):
        last = (hit, float(hit), 0.6) if hit else (400, 400.0, 0.2)
        rows = [(1, 0.1 + seed / 100, 0.1), last]
        meta = {"rng_seed": seed, "workload.max_allowed_runtime_sec": 400.0}
        made = made_trial(folder / "made", rows, meta)
        (made / "hparams.json").write_text(json.dumps({**point[0], **changed}))
        target = folder / label / f"study_{seed}" / f"{workload}_mini_pytorch" / "trial_1"
        target.parent.mkdir(parents=True, exist_ok=True)
        made.rename(target)
        result = {"steps_to_target": hit, "time_to_target": hit and float(hit)}
        result["global_step"] = hit or 400
        write_record(target, "finished", result, variant=variant)
        shutil.rmtree(folder / "made")


def annotated(folder: Path, table: str = "table1") -> tables.Table:
    made = comparisons.annotate(tables.TABLES[table](logs.find_trials([folder]), ROOT))
    return next(t for t in made if t.size == "mini")


def test_marks_ratios_and_pooled_settings_in_a_table(tmp_path):
    for workload in ("fastmri", "ogbg"):
        mini_runs(tmp_path, "shampoo_grafting", [200, 210, 220, 230, None], workload)
        mini_runs(tmp_path, "eshampoo_fixed", [100, 101, 102, 103, 104], workload)
    table = annotated(tmp_path)
    fixed = [row for row in table.rows if row.label == "eshampoo_fixed"]
    assert [row.values for row in fixed] == [[100, 101, 102, 103, 104]] * 2
    for row in fixed:
        assert row.comparison.verdict == "fewer" and row.comparison.mark == "*"
        assert row.comparison.difference == pytest.approx(2 / 252)
        assert row.comparison.difference_corrected == pytest.approx(4 * 2 / 252, rel=0.4)
        assert row.comparison.steps_ratio == pytest.approx(102 / 215)
    assert "4 tests, corrected together" in comparisons.rule(table)
    (pooled,) = table.pooled
    assert pooled.name == "EShampoo (F = 100)" and pooled.verdict == "fewer"
    assert pooled.difference == pytest.approx(2 / 252**2)
    for text in (table_text.render(table), table_files.to_markdown([table])):
        assert "102 ± 1 *" in text and "misses rank worst" in " ".join(text.split())
        assert "FastMRI, OGBG" in text
    assert max(len(line) for line in table_text.render(table).splitlines()) <= 100


def test_too_few_runs_are_said_to_decide_nothing(tmp_path):
    mini_runs(tmp_path, "shampoo_grafting", [200, 210])
    mini_runs(tmp_path, "eshampoo_fixed", [100, 110])
    text = comparisons.rule(annotated(tmp_path))
    assert "1 of 1 cannot be decided at all: the smallest p of a difference is 0.33" in text


def test_other_points_and_versions_are_not_compared(tmp_path):
    mini_runs(tmp_path, "eshampoo_fixed", [100, 110])
    table = annotated(tmp_path)
    assert all(row.comparison is None for row in table.rows) and comparisons.rule(table) == ""


def test_table_3_sets_minis_beside_the_rows_whose_frequency_they_translate(tmp_path, monkeypatch):
    studies = tmp_path / "studies"
    studies.mkdir()
    mapping = {"100": 10, "50": 5, "10": 2, "1": None}
    (studies / "table3.json").write_text(json.dumps({"mini": {"F": mapping}}))
    monkeypatch.setattr(tables, "STUDIES", studies)
    runs = tmp_path / "runs"
    mini_runs(runs, "shampoo_grafting", [200], precondition_frequency=10)
    mini_runs(runs, "eshampoo_fixed_F10", [150], precondition_frequency=10)
    mini_runs(runs, "eshampoo_fixed_F2", [140], precondition_frequency=2)
    mini_runs(runs, "eshampoo_adaptive_F2_tau0.01", [130], precondition_frequency=2, tau=0.01)
    mini_runs(runs, "eshampoo_adaptive_F2_tau0.1", [120], precondition_frequency=2, tau=0.1)
    mini_runs(runs, "eshampoo_fixed_lr", [9], precondition_frequency=10, learning_rate=0.5)
    table = annotated(runs, "table3")
    assert len([row for row in table.rows if row.paper]) == 26
    beside = {(r.paper["workload"], r.paper["name"]): r for r in table.rows if r.paper and r.runs}
    assert {key: row.values for key, row in beside.items()} == {
        ("fastmri", "Adam grafting (F = 100)"): [200],
        ("fastmri", "EShampoo (F = 100)"): [150],
        ("fastmri", "EShampoo (F = 10)"): [140],
        ("fastmri", "EShampoo (tau = 0.1, F = 10)"): [120],
    }
    # tau = 0.01 has no row at F = 10 on FastMRI, and another learning rate none at all.
    assert sorted(row.values[0] for row in table.rows if row.runs and not row.paper) == [9, 130]
    absent = [row for row in table.rows if row.absent]
    assert len(absent) == 5 and all(row.paper["precondition_frequency"] == 1 for row in absent)
    text = table_text.render(table)
    assert "no counterpart at this size: FastMRI, EShampoo (F = 1)" in " ".join(text.split())
    assert "Table 3, mini" in text


def test_full_size_has_the_ratio_to_the_papers_figures(tmp_path):
    from tests.study.test_tables import published_trials

    made = comparisons.annotate(tables.table1(published_trials(tmp_path), ROOT))
    full = next(table for table in made if table.size == "full")
    row = next(row for row in full.rows if row.runs and row.workload == "FastMRI")
    steps, time = table_files.paper_ratios(full, row)
    assert steps == pytest.approx(4645.3333 / 4301, rel=1e-6)
    assert time == pytest.approx((841.1768 + 564.9135 + 1727.7679) / 3 / 60 / 13.96, rel=1e-6)
    assert "steps / paper's" in table_files.to_markdown([full]) and "1.08" in table_files.to_latex(
        [full]
    )


def test_latex_is_escaped_and_has_every_row_with_runs(tmp_path):
    mini_runs(tmp_path, "shampoo_grafting", [200, 210])
    mini_runs(tmp_path, "eshampoo_fixed", [100, None])
    text = table_files.to_latex([annotated(tmp_path)])
    body = [line for line in text.splitlines() if line.startswith("FastMRI")]
    assert len(body) == 2 and all(line.endswith(r" \\") for line in body)
    assert r"shampoo\_grafting" in text and r"205 $\pm$ 5" in text
    header = next(line for line in text.splitlines() if "Workload" in line)
    assert {line.count(" & ") for line in body} == {header.count(" & ")}


def test_the_index_leads_to_every_run(tmp_path):
    mini_runs(tmp_path / "runs", "shampoo_grafting", [200, None])
    made = annotated(tmp_path / "runs")
    index = table_files.to_index([made], tmp_path / "tables", tmp_path)
    assert "1 of 2 hit; steps: 200, miss" in index
    links = [line.split("(<")[1].removesuffix(">)") for line in index.splitlines() if "(<" in line]
    assert len(links) == 2
    for link in links:
        assert ((tmp_path / "tables").resolve() / link).resolve().is_dir() or Path(link).is_dir()


def test_committed_tables_follow_from_the_committed_runs(tmp_path):
    listed = ROOT / "results" / "measured" / "tables.json"
    assert table_files.stale(ROOT, listed, write=False) == [], "make tables writes them anew"
    # And a table that does not is found: one that is not there, and one with another figure.
    entry = json.loads(listed.read_text())[0]
    copy = tmp_path / "results"
    shutil.copytree(ROOT / "results" / "paper", copy / "paper")
    for folder in entry["runs"]:
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "list.json").write_text(json.dumps([{**entry, "stem": "table"}]))
    for name in ("submissions", "search_spaces"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert len(table_files.stale(tmp_path, tmp_path / "list.json", write=True)) == 5
    assert table_files.stale(tmp_path, tmp_path / "list.json", write=False) == []
    text = (tmp_path / "table.csv").read_text()
    (tmp_path / "table.csv").write_text(text.replace("shampoo", "Shampoo", 1))
    assert table_files.stale(tmp_path, tmp_path / "list.json", write=False) == ["table.csv"]
