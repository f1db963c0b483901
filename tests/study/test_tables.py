"""Table 1: its figures by hand, its rows, its way back to the logs."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from algoperf_shampoo.study import logs, tables
from tests.study.test_logs import SHAMPOO, made_trial

ROOT = Path(__file__).parents[2]


def published_trials(tmp_path):
    """The published trials under our label and point, so that they meet the paper's row."""
    for path in SHAMPOO.glob("study_*/*/trial_2"):
        target = tmp_path / "shampoo_grafting" / path.relative_to(SHAMPOO)
        shutil.copytree(path, target)
        target.rename(target.with_name("trial_1"))
    return logs.find_trials([tmp_path])


def test_published_runs_make_the_papers_form(tmp_path):
    mini, full = tables.table1(published_trials(tmp_path), ROOT)
    assert all(row.runs == [] for row in mini.rows)
    row = next(r for r in full.rows if r.workload == "FastMRI" and r.runs)
    assert (row.hits, row.ended, row.version) == (3, 3, "v0.6")
    # (4894 + 5045 + 3997) / 3, and sqrt(((248.67)^2 + (399.67)^2 + (648.33)^2) / 2 / 3)
    assert row.steps.mean == pytest.approx(4645.3333, abs=1e-3)
    assert row.steps.error == pytest.approx(327.08, abs=0.01)
    assert row.seconds.mean == pytest.approx((841.1768 + 564.9135 + 1727.7679) / 3, abs=1e-3)
    assert row.paper["steps_mean"] == 4301
    assert row.runs[0].endswith("shampoo_grafting/study_0/fastmri_pytorch/trial_1")
    text = tables.to_text(full)
    assert "AlgoPerf v0.6" in text and re.search(r"3/3 +4645 ± 327 ", text)
    assert text.count("no runs yet") == 6  # 9 rows of the paper's, 3 of them with runs


def test_no_runs_at_all_shows_every_row_of_the_papers_table():
    for table in tables.table1([], ROOT):
        assert len(table.rows) == 9
        assert tables.to_text(table).count("no runs yet") >= 9


def test_mini_and_full_never_meet(tmp_path):
    trials = published_trials(tmp_path)
    mini_dir = tmp_path / "shampoo_grafting" / "study_0" / "fastmri_mini_pytorch" / "trial_1"
    shutil.copytree(tmp_path / "shampoo_grafting/study_0/fastmri_pytorch/trial_1", mini_dir)
    mini, full = tables.table1([*trials, logs.read_trial(mini_dir)], ROOT)
    assert sum(len(row.runs) for row in mini.rows) == 1
    assert not any("fastmri_mini_pytorch" in run for row in full.rows for run in row.runs)
    assert "own small models" in mini.caption


def test_minidata_runs_are_in_a_table_of_their_own(tmp_path):
    made_trial(tmp_path, [(1, 1.0, 0.1), (9, 9.0, 0.6)])
    folder = tmp_path / "label" / "study_1"
    (folder / "w_pytorch").rename(folder / "ogbg_minidata_pytorch")
    mini, minidata, full = tables.table1(logs.find_trials([tmp_path]), ROOT)
    assert [len(row.runs) for row in minidata.rows] == [1] and minidata.rows[0].paper is None
    assert not any(row.runs for table in (mini, full) for row in table.rows)
    assert [t.size for t in tables.of_runs(logs.find_trials([tmp_path]), ROOT)] == ["minidata"]


def test_other_hyperparameters_are_another_row(tmp_path):
    trials = published_trials(tmp_path)
    changed = tmp_path / "shampoo_grafting" / "study_2" / "fastmri_pytorch" / "trial_1"
    point = json.loads((changed / "hparams.json").read_text())
    (changed / "hparams.json").write_text(json.dumps({**point, "learning_rate": 1.0}))
    full = tables.table1(logs.find_trials([tmp_path]), ROOT)[1]
    counts = sorted(len(row.runs) for row in full.rows if row.workload == "FastMRI" and row.runs)
    assert counts == [1, 2] and len(trials) == 9


def test_misses_count_and_holes_do_not(tmp_path):
    hit = made_trial(tmp_path / "a", [(1, 1.0, 0.1), (9, 9.0, 0.6)])
    miss = made_trial(tmp_path / "b", [(1, 1.0, 0.1), (28, 28.0, 0.2)])
    cut = made_trial(tmp_path / "c", [(1, 1.0, 0.1)])
    trials = [logs.read_trial(path) for path in (hit, miss, cut)]
    row = tables.build(trials, [], ("full",), ROOT / "workloads_config", tmp_path)[0].rows[0]
    assert (row.hits, row.ended, len(row.runs)) == (1, 2, 3)
    assert row.steps == tables.Estimate(9.0, None, 1)
    assert row.notes[0] == "1 of 3 runs not counted: see below"
    assert "one evaluation only" in row.notes[1]


def test_standard_error_of_known_numbers():
    estimate = tables.Estimate.of([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert estimate.mean == 5.0
    assert estimate.error == pytest.approx(math.sqrt(32 / 7 / 8))
    assert tables.Estimate.of([3.0]) == tables.Estimate(3.0, None, 1)
    assert tables.Estimate.of([]) is None
    assert tables.Estimate(3.0, None, 1).text(0) == "3"


def test_all_formats_hold_the_same_rows(tmp_path):
    made = tables.table1(published_trials(tmp_path), ROOT)
    markdown, csv_text = tables.to_markdown(made), tables.to_csv(made)
    content = json.loads(tables.to_json(made))
    assert sum(len(table["rows"]) for table in content) == 18 == csv_text.count("\n") - 1
    for run in content[1]["rows"][0]["runs"]:
        assert run in markdown


def test_the_papers_tables_as_typed():
    one = tables.read_paper(ROOT / "results" / "paper" / "table1.json")
    three = tables.read_paper(ROOT / "results" / "paper" / "table3.json")
    assert len(one) == 9 and len(three) == 26
    assert all(row in three for row in one)
    means = {(r["workload"], r["variant"]): r["steps_mean"] for r in one}
    assert means["fastmri", "eshampoo_fixed"] == 2536
    assert means["imagenet_vit", "shampoo_grafting"] == 79907
    assert means["ogbg", "eshampoo_adaptive"] == 7117
