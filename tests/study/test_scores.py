"""AlgoPerf's score against every published one, and places in the 2026 pool."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from algoperf_shampoo import versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import logs, rank, scores
from tests.study.test_logs import made_trial

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "results" / "published"
SCORES = json.loads((PUBLISHED / "scores.json").read_text())["scores"]


@pytest.mark.parametrize("pool", SCORES)
def test_scores_are_the_published_ones(pool):
    version = versions.read(pool.split("_")[0])
    times = scores.read_times(PUBLISHED / f"times_{pool}.csv")
    found = scores.scores(times, version.base_workloads, version.held_out_workloads)
    # scores.csv of 2026 has all digits, the leaderboards four.
    tolerance = 1e-6 if pool == "2026_self" else 5.1e-5
    assert found == pytest.approx(SCORES[pool], abs=tolerance)
    assert len(found) == {"v0.5_external": 11, "v0.5_self": 6, "v0.6_external": 2}.get(pool, 17)


def trial(folder: Path, study: int, number: int, rows: list[tuple]) -> logs.Trial:
    path = made_trial(folder / f"{study}_{number}", rows)
    target = path.parents[1].with_name(f"study_{study}") / path.parent.name
    target.parent.mkdir(exist_ok=True)
    path.parent.rename(target)
    made = target / "trial_1"
    made.rename(target / f"trial_{number}")
    return logs.read_trial(target / f"trial_{number}")


def test_time_to_target_is_the_median_of_the_studies_first_trials(tmp_path):
    slow_steps = [(1, 1.0, 0.1), (2, 50.0, 0.9)]
    many_evaluations = [(1, 1.0, 0.1), (2, 2.0, 0.1), (3, 3.0, 0.9)]
    one = [trial(tmp_path, 1, 1, slow_steps), trial(tmp_path, 1, 2, many_evaluations)]
    assert scores.time_to_target(one) == 50.0  # fewest evaluations, not least time
    tie = [trial(tmp_path, 2, 1, slow_steps), trial(tmp_path, 2, 2, [(1, 1, 0.1), (2, 40, 0.9)])]
    assert scores.time_to_target(tie) == 40.0
    missed = [trial(tmp_path, 3, 1, [(1, 1.0, 0.1), (2, 29.0, 0.1)])]
    assert scores.time_to_target([*one, *tie, *missed]) == 50.0
    assert math.isinf(scores.time_to_target([*one, *missed, trial(tmp_path, 4, 1, [(1, 1, 0.1)])]))
    assert math.isinf(scores.time_to_target([]))


def test_profile_and_score_by_hand():
    times = {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 2.5, "y": 1.0}, "c": {"x": 4.1}}
    ratios = scores.ratios(times, ["x", "y"])
    assert ratios == {"a": [1.0, 2.0], "b": [2.5, 1.0], "c": [math.inf, math.inf]}
    rho = scores.profile(ratios["a"])
    assert rho[0] == 0.5 and rho[-1] == 1.0 and len(rho) == 100
    # Half a workload from 1, the other from the first of 100 points at or above 2.
    assert scores.score(ratios["a"]) == pytest.approx(0.5 + 0.5 * (2 / 3 + 1 / 198), abs=1e-12)
    assert scores.score(ratios["c"]) == 0.0


def test_a_workload_whose_variant_is_missed_does_not_count():
    times = {"a": {"x": 1.0, "x_tanh": math.inf}, "b": {"x": 2.0, "x_tanh": 1.0}}
    assert scores.ratios(times, ["x"], ["x_tanh"]) == {"a": [math.inf], "b": [2.0]}


def test_the_papers_rows_in_the_2026_pool():
    entry = rank.of_paper("eshampoo_adaptive", ROOT)
    assert set(entry.times) == {"fastmri", "imagenet_vit", "ogbg"}
    assert entry.times["fastmri"] == pytest.approx(2468 * 0.376, rel=0.2)
    assert entry.times["fastmri"] > 2468 * 0.376  # ours comes on top
    lines = rank.place(entry, ROOT)
    assert lines[0].startswith("eshampoo_adaptive (paper's steps): score 0.")
    text = "\n".join(lines)
    assert "of 18 in the pool of 2026" in text and "counted as not reached, not run" in text
    assert text.count("x (0.") == 3 and "schedule_free_adamw_v2" in text
    with pytest.raises(UserError, match="VARIANT=nadamw: the paper's Table 1 has shampoo_grafting"):
        rank.of_paper("nadamw", ROOT)


def test_runs_in_the_pool_with_what_was_assumed():
    runs = logs.find_trials([ROOT / "tests" / "data" / "published" / "2026"])
    (own,) = [entry for entry in rank.of_runs(runs) if entry.name == "nadamw"]
    text = "\n".join(rank.place(own, ROOT))
    assert text.startswith("nadamw (yours): score 0.") and "imagenet_vit" in text
    assert "the median of 1 runs (study_2 hit" in text and "not run: criteo1tb, fastmri" in text
    slow = rank._finished(rank.Entry("slow", {"ogbg": 17000.0}))
    assert (
        math.isinf(slow.times["ogbg"]) and "more than the self-tuning budget" in slow.assumptions[0]
    )


def test_a_copied_study_changes_no_median_and_runs_that_differ_are_said(tmp_path):
    def entry() -> rank.Entry:
        (made,) = rank.of_runs(logs.find_trials([tmp_path]))
        return made

    source = ROOT / "tests" / "data" / "published_v06" / "shampoo"
    for study in range(3):
        there = f"study_{study}/ogbg_pytorch/trial_2"
        shutil.copytree(source / there, tmp_path / "shampoo" / there)
    alone = entry()
    assert not any("differ" in text for text in alone.assumptions)
    shutil.copytree(tmp_path / "shampoo/study_0", tmp_path / "shampoo/study_7")
    again = entry()
    assert again.times == alone.times
    assert again.assumptions[0].startswith("1 folder left out")
    shutil.rmtree(tmp_path / "shampoo/study_7")
    hparams = tmp_path / "shampoo" / there / "hparams.json"
    hparams.write_text('{"learning_rate": 0.1}')
    assert "ogbg: runs that differ in point" in entry().assumptions
    meta = hparams.with_name("meta_data_0.json")
    text = json.loads(meta.read_text())
    meta.write_text(json.dumps({**text, "workload.max_allowed_runtime_sec": 9000}))
    assert "ogbg: runs that differ in version, point, seconds at most" in entry().assumptions


def test_minis_and_bad_files_are_refused(tmp_path):
    minis = logs.find_trials([ROOT / "results" / "measured" / "mini" / "seeds" / "eshampoo_fixed"])
    with pytest.raises(UserError, match="no full-size runs"):
        rank.of_runs(minis)
    (tmp_path / "times.csv").write_text("submission,x\na,-1\n")
    with pytest.raises(UserError, match="line 2: a time that is no number above 0"):
        scores.read_times(tmp_path / "times.csv")
    with pytest.raises(UserError, match="no such file"):
        scores.read_times(tmp_path / "nothing.csv")
    scores.write_times(tmp_path / "again.csv", {"a": {"x": 1.5, "y": math.inf}, "b": {"x": 2.0}})
    assert scores.read_times(tmp_path / "again.csv") == {
        "a": {"x": 1.5, "y": math.inf},
        "b": {"x": 2.0, "y": math.inf},
    }
