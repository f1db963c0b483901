"""Where a run stands: against made-up runs, an earlier run of its own, and published logs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import spec as harness_spec
from algoperf_shampoo.study import progress, standing, status
from algoperf_shampoo.study.standing import Point, Rival, Standing
from tests.harness import fakes
from tests.study.test_logs import SHAMPOO, made_trial

RIVAL = Rival(
    "nadamw study_1", "w", "accuracy", (Point(1, 2, 0.1), Point(10, 20, 0.4), Point(30, 80, 0.5))
)


def spec_of(folder: Path, workload: str = "w", seed: int = 1) -> harness_spec.RunSpec:
    run = fakes.spec_in(folder, seed=seed)
    inner = folder / "label" / f"study_{seed}" / f"{workload}_pytorch" / "trial_1"
    return dataclasses.replace(run, workload=workload, run_dir=inner)


@pytest.mark.parametrize(
    ("value", "step", "seconds"),
    [(0.05, 1, 2), (0.1, 1, 2), (0.25, 5.5, 11), (0.4, 10, 20), (0.45, 20, 50), (0.5, 30, 80)],
)
def test_a_value_is_reached_between_two_evaluations(value, step, seconds):
    there = RIVAL.at(value)
    assert there is not None
    assert (there.step, there.seconds) == (pytest.approx(step), pytest.approx(seconds))


def test_a_metric_that_falls():
    rival = Rival("r", "w", "ppl", (Point(1, 1, 100.0), Point(11, 21, 50.0)))
    assert rival.at(75.0) == Point(6, 11, 75.0) and rival.at(49.0) is None


def test_the_line_says_both_places_and_the_ratios():
    here = Point(8, 30.0, 0.4)
    assert Standing(RIVAL, here, RIVAL.at(0.4)).line() == (
        "against nadamw study_1: accuracy 0.4000 here at step 8, 30.0 s, there at step 10, 20.0 s: "
        "20% fewer steps, 50% more time"
    )
    same = Standing(RIVAL, Point(10, 20.0, 0.4), RIVAL.at(0.4))
    assert same.ratios() == "as many steps, as much time"
    ahead = Standing(RIVAL, Point(8, 30.0, 0.6), RIVAL.at(0.6))
    assert ahead.line().endswith("never there (best 0.5000 at step 30, 80.0 s)")
    slow = Standing(RIVAL, Point(40, 19.0, 0.4), RIVAL.at(0.4))
    assert slow.ratios() == "4.0 times the steps, 5% less time" and slow.short() == (
        "+300% steps, -5% time"
    )


def test_only_what_was_better_than_all_before_counts(tmp_path):
    rows = [(1, 1.0, 0.2), (5, 5.0, 0.1), (9, 9.0, "nan"), (13, 13.0, 0.3), (17, 17.0, 0.25)]
    folder = made_trial(tmp_path, rows)
    rival = standing.choose(folder, spec_of(tmp_path / "other"))
    assert rival.points == (Point(1, 1.0, 0.2), Point(13, 13.0, 0.3))
    assert rival.name == "label study_1"
    found = standing.of(folder, rival)
    assert found is not None and found.here == found.there == Point(13, 13.0, 0.3)


def test_the_same_seed_is_chosen_and_never_the_run_itself(tmp_path):
    meta = {"rng_seed": 1}
    one = made_trial(tmp_path / "a", [(1, 1.0, 0.2)], meta)
    two = made_trial(tmp_path / "b", [(1, 1.0, 0.2)], {"rng_seed": 2})
    two.parents[1].rename(two.parents[2] / "study_2")
    assert standing.choose(tmp_path, spec_of(tmp_path / "c", seed=2)).name == "label study_2"
    assert standing.choose(tmp_path, spec_of(tmp_path / "c", seed=1)).name == "label study_1"
    assert standing.choose(tmp_path, spec_of(tmp_path / "a", seed=1)).name == "label study_2"
    assert one.is_dir()
    with pytest.raises(UserError, match="AGAINST=.*: no run of w with evaluations"):
        standing.choose(tmp_path / "a", spec_of(tmp_path / "a", seed=1))
    with pytest.raises(UserError, match="no run of ogbg with evaluations .runs there: w"):
        standing.choose(tmp_path, spec_of(tmp_path, workload="ogbg_mini"))
    with pytest.raises(UserError, match="no such folder of runs"):
        standing.choose(tmp_path / "none", spec_of(tmp_path))
    runs = [spec_of(tmp_path / "c"), spec_of(tmp_path / "c", workload="ogbg_mini")]
    assert list(standing.choose_each(tmp_path, runs)) == [runs[0].run_dir]


def test_a_mini_against_a_published_run_says_that_it_is_of_another_size(tmp_path):
    rival = standing.choose(SHAMPOO, spec_of(tmp_path, workload="fastmri_mini"))
    assert rival.name == "shampoo study_0, fastmri, another size"
    one = SHAMPOO / "study_1" / "fastmri_pytorch" / "trial_2"
    rival = standing.choose(one, spec_of(tmp_path, workload="fastmri"))
    assert rival.name == "shampoo study_1 trial 2"
    hit = rival.at(0.723653)  # the target, between the evaluations around step 5045
    assert hit is not None and 4200 < hit.step < 5045 and 500 < hit.seconds < 565


def test_it_is_told_at_each_evaluation_and_in_the_status(tmp_path):
    def named(folder: Path, seed: int) -> harness_spec.RunSpec:
        run = fakes.spec_in(folder, seed=seed)
        inner = folder / "fake" / f"study_{seed}" / "ogbg_mini_pytorch" / "trial_1"
        return dataclasses.replace(run, workload="ogbg_mini", run_dir=inner)

    def execute(run: harness_spec.RunSpec, told) -> list[str]:
        lines: list[str] = []
        from algoperf_shampoo.harness import runner

        root = Path(__file__).parents[2]
        workload, submission = fakes.FakeWorkload(), fakes.make_submission()
        runner.execute(run, workload, submission, root, echo=lines.append, standing=told)
        return lines

    earlier, later = named(tmp_path / "earlier", 1), named(tmp_path / "later", 2)
    quiet = execute(earlier, standing.teller(None, [earlier]))
    assert not any("against" in line for line in quiet)
    lines = execute(later, standing.teller(tmp_path / "earlier", [later]))
    told = [line for line in lines if ": against fake study_1: accuracy " in line]
    assert len(told) == 5  # steps 1, 10, 20, 30, 40
    rivals = standing.choose_each(tmp_path / "earlier", [later])
    ((_, now),) = status.look([later], None, rivals)
    found = standing.of(later.run_dir, rivals[later.run_dir])
    assert found is not None and now.standing == found.short() and now.state == progress.DONE
    assert f"({found.short()})" in status.render("title", [(later, now)], width=200)
    spoiled = earlier.run_dir / "eval_measurements.csv"
    whole = spoiled.read_text()
    spoiled.write_text(whole.replace("0.", "1.", 1))
    with pytest.raises(standing.DamagedRival, match="AGAINST=.*trial_1: damaged: .*changed since"):
        standing.choose_each(tmp_path / "earlier", [later])
    spoiled.write_text(whole)
    # Against its own copy every ratio is one.
    same = dataclasses.replace(later, run_dir=tmp_path / "elsewhere")
    again = standing.of(later.run_dir, standing.choose(later.run_dir, same))
    assert again is not None and again.ratios() == "as many steps, as much time"
