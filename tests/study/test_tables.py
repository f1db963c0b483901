"""Table 1: its figures by hand, its rows, its way back to the logs."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import pytest

from algoperf_shampoo.study import differences, logs, table_files, table_text, tables
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
    text = table_text.render(full)
    assert "AlgoPerf v0.6" in text
    assert re.search(r"\[1\] shampoo_grafting +3/3 +4645 ± 327 .*4301 ± 109", text)
    assert "[1] shampoo_grafting/study_{0,1,2}/fastmri_pytorch/trial_1" in text
    # 9 rows of the paper's, 3 of them with runs: the others are named in one line
    (missing,) = re.findall(r"^no runs yet: .*(?:\n +.*)*", text, re.M)
    assert missing.count("eshampoo_fixed") == missing.count("eshampoo_adaptive") == 3
    assert "shampoo_grafting" not in missing


def test_no_runs_at_all_shows_every_row_of_the_papers_table():
    for table in tables.table1([], ROOT):
        assert len(table.rows) == 9
        assert table_text.render(table) == f"Table 1, {table.size}: no runs yet"
        assert table_files.to_markdown([table]).count("no runs yet") >= 9


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
    row = tables.build(trials, [], ("full",), tmp_path)[0].rows[0]
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
    markdown, csv_text = table_files.to_markdown(made), table_files.to_csv(made)
    content = json.loads(table_files.to_json(made))
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


def _embedded(folder: Path, label: str, point: dict, seed: int = 1, trial: int = 1) -> Path:
    path = folder / label / f"study_{seed}" / "ogbg_mini_pytorch" / f"trial_{trial}"
    shutil.copytree(ROOT / "results/measured/mini/seeds/eshampoo_adaptive/study_1", path.parents[1])
    for odd in (path.parents[1]).iterdir():
        if odd.name != "ogbg_mini_pytorch":
            shutil.rmtree(odd)
    if trial != 1:
        (path.parent / "trial_1").rename(path)
    (path / "hparams.json").write_text(json.dumps(point))
    return path


def test_every_field_that_differs_is_said_in_every_format(tmp_path):
    """Three points of one variant, and a fourth of another trial: four rows told apart."""
    space = json.loads((ROOT / "search_spaces/mini/eshampoo_adaptive.json").read_text())
    (point,) = space
    changes = [{}, {"learning_rate": 0.02}, {"learning_rate": 0.5, "one_dim": "adam", "tau": 0.3}]
    for number, change in enumerate(changes):
        folder = tmp_path / f"{number}"
        _embedded(folder, "eshampoo_adaptive", point | change)
    _embedded(tmp_path / "3", "eshampoo_adaptive", point | {"weight_decay": 0}, trial=2)
    mini = tables.table1(logs.find_trials([tmp_path]), ROOT)[0]
    rows = [row for row in mini.rows if row.runs]
    own = point["learning_rate"]
    names = {
        "eshampoo_adaptive (F = 10, tau = 0.1)",
        f"eshampoo_adaptive (F = 10, tau = 0.1, learning_rate = 0.02 ({own}))",
        f"eshampoo_adaptive (F = 10, tau = 0.3 (0.1), learning_rate = 0.5 ({own}), "
        "one_dim = adam (full))",
        f"eshampoo_adaptive trial 2 (F = 10, tau = 0.1, weight_decay = 0 "
        f"({point['weight_decay']:.6g}))",
    }
    assert {row.name for row in rows} == names
    markdown, csv_text = table_files.to_markdown([mini]), table_files.to_csv([mini])
    assert all(name in markdown for name in names)
    assert f"learning_rate = 0.5 ({own}); tau = 0.3 (0.1); one_dim = adam (full)" in csv_text
    content = json.loads(table_files.to_json([mini]))[0]["rows"]
    assert {"field": "learning_rate", "value": 0.02, "own": own} in [
        difference for row in content for difference in row["differs"]
    ]
    text = table_text.render(mini)
    assert text.count("[2]") == 2 and "[2] 1/eshampoo_adaptive/study_1" in text


@pytest.mark.parametrize(
    ("point", "value"),
    [
        ({"precondition_frequency": 100, "one_minus_beta2": 0.025}, 2.5),
        ({"precondition_frequency": 100, "beta2": 0.975}, 2.5),
        ({"precondition_frequency": 1, "one_minus_beta2": 0.5, "beta2": 0.1}, 0.5),
        ({"one_minus_beta2": 0.025}, None),
        ({"precondition_frequency": 100}, None),
        ({"precondition_frequency": "100", "one_minus_beta2": 0.1}, None),
        ({"precondition_frequency": True, "one_minus_beta2": 0.1}, None),
        ({"precondition_frequency": 10**400, "one_minus_beta2": 0.1}, None),
        ({"precondition_frequency": 1e300, "one_minus_beta2": 1e300}, None),
        ({}, None),
    ],
)
def test_staleness_of_a_point(point, value):
    assert differences.staleness(point) == (value if value is None else pytest.approx(value))


def test_f_over_the_memory_of_the_averages_is_in_every_format(tmp_path):
    (point,) = json.loads((ROOT / "search_spaces/mini/eshampoo_adaptive.json").read_text())
    _embedded(tmp_path, "eshampoo_adaptive_F2", point | {"precondition_frequency": 2})
    made = tables.table1([*logs.find_trials([tmp_path]), *published_trials(tmp_path / "p")], ROOT)
    mini, full = made
    (row,) = [row for row in mini.rows if row.runs]
    assert row.staleness == pytest.approx(2 * point["one_minus_beta2"]) and row.paper is None
    of_paper = {row.paper["name"]: row.paper_staleness for row in full.rows if row.paper}
    assert of_paper == {
        "Adam grafting (F = 100)": pytest.approx(2.508024),
        "EShampoo (F = 100)": pytest.approx(2.508024),
        "EShampoo (tau = 0.1, F = 50)": pytest.approx(1.254012),
    }
    assert "F(1-beta2) = 0.251" in table_text.render(mini)
    assert "F(1-beta2) = 2.51, the paper's 2.51" in " ".join(table_text.render(full).split())
    name = "eshampoo_adaptive (F = 2 (10), tau = 0.1)"
    assert f"| {name} | 0.251 |" in table_files.to_markdown([mini])
    assert name.replace("_", r"\_") + " & 0.251 &" in table_files.to_latex([mini])
    lines = csv.DictReader(table_files.to_csv([mini]).splitlines())
    (value,) = {line["f_one_minus_beta2"] for line in lines} - {""}
    assert float(value) == row.staleness
    header, body = tables.cells(full)
    assert all(len(line) == len(header) for line in body)


def test_rows_of_labels_that_are_no_variants_are_told_apart(tmp_path):
    for number, change in enumerate([{"a": 1, "b": True}, {"a": 2, "b": True}, {"b": True}]):
        path = made_trial(tmp_path / f"{number}", [(1, 1.0, 0.1), (9, 9.0, 0.6)])
        (path / "hparams.json").write_text(json.dumps(change))
    full = tables.build(logs.find_trials([tmp_path]), [], ("full",), ROOT)[0]
    assert {row.name for row in full.rows} == {
        "label (a = 1)", "label (a = 2)", "label (a = absent)",
    }  # fmt: skip


@pytest.mark.parametrize("width", [80, 100])
def test_text_keeps_to_its_width(tmp_path, width):
    point = {"learning_rate": 0.0014381744028656841, "precondition_frequency": 100, "tau": 0.25}
    for seed in range(7):
        rows = [(1, 1.0, 0.1), (28000, 20.0 + seed, 0.2 + 0.1 * seed)]
        path = made_trial(tmp_path / f"{seed}", rows)
        target = tmp_path / f"shampoo_grafting/study_{seed}/imagenet_vit_pytorch/trial_1"
        shutil.copytree(path, target)
        (target / "hparams.json").write_text(json.dumps(point))
        shutil.rmtree(tmp_path / f"{seed}")
    paper = tables.read_paper(ROOT / "results" / "paper" / "table1.json")
    trials = logs.find_trials([tmp_path])
    made = tables.build(trials, paper, ("full",), tmp_path)
    text = table_text.render(made[0], width)
    assert "4/7" in text and "study_{0,1,2,3,4,5,6}" in text
    assert max(map(len, text.splitlines())) <= width, text
    beside = table_text.render(tables.table1(published_trials(tmp_path / "p"), ROOT)[1], width)
    assert ("paper's hits" in beside) == (width == 100)
    assert "13.96 ± 0.44" in beside
    # A path is never broken, however long this test's folder is.
    lines = [line for line in beside.splitlines() if not line.startswith("runs, below ")]
    assert max(map(len, lines)) <= width and len(lines) == len(beside.splitlines()) - 1
