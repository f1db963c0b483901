"""A fixed number of steps, past the targets: its record, its stop, and the tables it is not in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import logs, plan, progress, tables
from tests.harness import fakes
from tests.harness.test_runner import curve, rows

ROOT = Path(__file__).parents[2]
LOW = {"validation_target_value": 0.3, "test_target_value": 0.3}  # reached within 40 steps


def spec_in(folder: Path, **changes: object):
    return dataclasses.replace(fakes.spec_in(folder), stop_at_target=False, **changes)


def test_it_goes_on_past_its_targets_and_says_so(tmp_path):
    stopping = fakes.spec_in(tmp_path / "a")
    ended = fakes.execute(stopping, fakes.FakeWorkload(**LOW))["result"]
    assert ended["stop_reason"] == "targets reached" and ended["global_step"] < 40
    lines: list[str] = []
    run = spec_in(tmp_path / "b")
    record = fakes.execute(run, fakes.FakeWorkload(**LOW), echo=lines.append)
    assert record["result"]["stop_reason"] == "all steps done"
    assert record["result"]["global_step"] == 40
    assert record["identity"]["stop_at_target"] is False
    assert "it went on to step 40 for all steps" in lines[-1]
    flags = json.loads((run.run_dir / "flags_0.json").read_text())
    assert flags["stop_at_target"] is False and flags["max_global_steps"] == 40
    # The same curve, as far as the other one goes.
    losses = [rows(r.run_dir / "step_losses.csv") for r in (stopping, run)]
    assert losses[1][: len(losses[0])] == losses[0] and len(losses[1]) == 40


def test_evaluations_of_its_own_change_no_step(tmp_path):
    usual, own = spec_in(tmp_path / "a"), spec_in(tmp_path / "b", eval_period=16)
    records = [fakes.execute(run, fakes.FakeWorkload(**LOW)) for run in (usual, own)]
    assert "eval_period_steps" not in records[0]["identity"]
    assert records[1]["identity"]["eval_period_steps"] == 16
    steps = [[row["global_step"] for row in rows(run.run_dir / "eval_measurements.csv")]
             for run in (usual, own)]  # fmt: skip
    assert steps == [["1", "10", "20", "30", "40"], ["1", "16", "32", "40"]]
    assert progress.of(own.run_dir, own).state == progress.DONE
    other = dataclasses.replace(own, eval_period=20)
    assert "eval_period_steps is 16 there and 20 now" in progress.of(own.run_dir, other).note


def test_a_run_to_the_target_is_another_run(tmp_path):
    fakes.execute(fakes.spec_in(tmp_path))
    assert (
        "stop_at_target"
        not in json.loads((fakes.spec_in(tmp_path).run_dir / "run.json").read_text())["identity"]
    )
    with pytest.raises(UserError, match="another run: stop_at_target is .absent. there and false"):
        fakes.execute(spec_in(tmp_path))


def test_time_does_not_cut_it_short(tmp_path):
    short = {"max_allowed_runtime_sec": 1e-9}
    cut = fakes.execute(fakes.spec_in(tmp_path / "a"), fakes.FakeWorkload(**short))["result"]
    assert cut["stop_reason"] == "time budget spent"
    whole = fakes.execute(spec_in(tmp_path / "b"), fakes.FakeWorkload(**short))["result"]
    assert whole["global_step"] == 40 and whole["stop_reason"] == "all steps done"


def test_broken_off_it_goes_on_along_the_same_curve(tmp_path):
    whole, broken = spec_in(tmp_path / "a"), spec_in(tmp_path / "b")
    fakes.execute(whole, fakes.FakeWorkload(**LOW))

    def breaking(**given):
        if given["global_step"] == 25 and not done:
            done.append(True)
            raise RuntimeError("power cut")
        return fakes._update_params(**given)

    done: list[bool] = []
    with pytest.raises(RuntimeError, match="power cut"):
        fakes.execute(broken, fakes.FakeWorkload(**LOW), update_params=breaking)
    fakes.execute(broken, fakes.FakeWorkload(**LOW))
    assert curve(whole.run_dir) == curve(broken.run_dir)


def mini_spec(folder: Path):
    """The fake under a mini's name and metric, so that tables would list it."""
    inner = folder / "nadamw" / "study_1" / "ogbg_mini_pytorch" / "trial_1"
    return spec_in(folder, variant="nadamw", label="nadamw", workload="ogbg_mini", run_dir=inner)


def test_it_is_in_no_table_of_times_to_the_target(tmp_path):
    run = mini_spec(tmp_path / "all")
    record = fakes.execute(run, fakes.FakeWorkload(**LOW))
    assert record["result"]["steps_to_target"] is not None
    trial = logs.read_trial(run.run_dir)
    assert (trial.outcome, trial.steps_to_target, trial.to_target) == ("all steps", None, False)
    assert trial.holes == []
    inner = run.run_dir.relative_to(tmp_path / "all")
    own = dataclasses.replace(run, stop_at_target=True, run_dir=tmp_path / "to" / inner)
    fakes.execute(own, fakes.FakeWorkload(**LOW))
    mini, *_ = tables.table1([trial, logs.read_trial(own.run_dir)], ROOT)
    listed = [row for row in mini.rows if row.runs]
    assert [(row.hits, row.ended, len(row.runs)) for row in listed] == [(1, 1, 1)]
    assert "Left out: 1 run of all steps" in mini.caption
    assert progress.of(run.run_dir).state == progress.DONE
    # A record that was made to look like one of a run to the target is no record.
    path = run.run_dir / "run.json"
    path.write_text(path.read_text().replace('"stop_at_target": false', '"stop_at_target": true'))
    assert logs.read_trial(run.run_dir).outcome == "unknown"


def test_a_diverged_run_is_done_and_worst(tmp_path):
    def diverging(**given):
        result = fakes._update_params(**given)
        if given["global_step"] == 22:
            for parameter in given["current_param_container"].parameters():
                parameter.data.fill_(float("nan"))
        return result

    run = mini_spec(tmp_path)
    record = fakes.execute(run, update_params=diverging)
    assert record["status"] == "diverged"
    assert logs.read_trial(run.run_dir).outcome == "all steps"
    now = progress.of(run.run_dir)
    assert (now.state, now.note) == (progress.DONE, "diverged")


def test_words(tmp_path):
    made = plan.make_plan(ROOT, ["nadamw"], workload="ogbg", all_steps=True, out=str(tmp_path))
    (run,) = made.runs
    assert run.label == "nadamw_allsteps" and not run.stop_at_target
    cut = plan.make_plan(ROOT, ["nadamw"], workload="ogbg", all_steps=True, steps="50")
    assert cut.runs[0].label == "nadamw_steps50_allsteps"
    rare = plan.make_plan(ROOT, ["nadamw"], workload="ogbg", all_steps=True, evals="125")
    assert rare.runs[0].label == "nadamw_allsteps_evals125" and rare.runs[0].eval_period == 125
    with pytest.raises(UserError, match="EVALS=125: a run to its target is evaluated as its"):
        plan.make_plan(ROOT, ["nadamw"], workload="ogbg", evals="125")
    with pytest.raises(UserError, match="EVALS=0: an integer of at least 1"):
        plan.make_plan(ROOT, ["nadamw"], workload="ogbg", all_steps=True, evals="0")
    with pytest.raises(UserError, match="ALL_STEPS=1: AlgoPerf's harness stops at the targets"):
        plan.make_plan(ROOT, ["nadamw"], harness="algoperf", all_steps=True)
