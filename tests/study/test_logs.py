"""The reader on published logs, whose figures were computed with awk, and on logs with holes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import seal
from algoperf_shampoo.study import logs

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "data" / "published_v06"
SHAMPOO = PUBLISHED / "shampoo"

# awk: the first row whose validation metric reaches the target (see the excerpt's README)
EXPECTED = {
    ("fastmri", 0): (4894, 841.1767997741699),
    ("fastmri", 1): (5045, 564.9135346412659),
    ("fastmri", 2): (3997, 1727.7679150104523),
    ("imagenet_vit", 0): (82295, 41094.59843540192),
    ("imagenet_vit", 1): (75746, 37739.50162053108),
    ("imagenet_vit", 2): (81525, 43187.0888710022),
    ("ogbg", 0): (11856, 3127.330799818039),
    ("ogbg", 1): (14753, 3841.5681121349335),
    ("ogbg", 2): (11770, 3111.3802618980408),
}


@pytest.mark.parametrize(("workload", "study"), EXPECTED)
def test_published_shampoo_steps_and_times_to_target(workload, study):
    trial = logs.read_trial(SHAMPOO / f"study_{study}" / f"{workload}_pytorch" / "trial_2")
    assert (trial.steps_to_target, trial.time_to_target) == EXPECTED[workload, study]
    assert trial.outcome == "hit" and trial.holes == [] and trial.source == "algoperf"
    assert (trial.label, trial.study, trial.trial) == ("shampoo", f"study_{study}", 2)
    assert (trial.workload, trial.framework) == (workload, "pytorch")
    assert trial.hparams["learning_rate"] == 0.0014381744028656841


def test_a_run_that_spent_its_budget_is_a_miss():
    for path in ("shampoo/study_0/fastmri_pytorch/trial_1", "baseline/study_0/ogbg_jax/trial_1"):
        trial = logs.read_trial(PUBLISHED / path)
        assert trial.outcome == "miss" and trial.holes == []
        assert trial.steps_to_target is None and trial.time_to_target is None


@pytest.mark.parametrize(
    ("path", "hole"),
    [
        (
            "baseline/study_0/imagenet_vit_jax/trial_1",
            "one evaluation only: the log breaks off at step 1, 66 s of a budget of 69768 s",
        ),
        ("shampoo/study_2/imagenet_vit_pytorch/trial_1", "no eval_measurements.csv"),
        (
            "shampoo/study_0/ogbg_pytorch/trial_1",
            "17 evaluations: the log breaks off at step 14885, 3841 s of a budget of 12011 s",
        ),
    ],
)
def test_a_log_with_a_hole_is_said_to_have_it_and_nothing_is_guessed(path, hole):
    trial = logs.read_trial(PUBLISHED / path)
    assert trial.outcome == "unknown"
    assert any(found.startswith(hole) for found in trial.holes), trial.holes
    assert trial.steps_to_target is None and trial.time_to_target is None


COLUMNS = "global_step,accumulated_submission_time,validation/accuracy,preemption_count"


def made_trial(folder: Path, rows: list[tuple], meta: dict | None = None) -> Path:
    """A trial folder with evaluations (step, submission time, accuracy[, session]), target 0.5."""
    path = folder / "label" / "study_1" / "w_pytorch" / "trial_1"
    path.mkdir(parents=True)
    lines = [COLUMNS, *(",".join(map(str, (*row, 0)[:4])) for row in rows)]
    (path / "eval_measurements.csv").write_text("\n".join(lines) + "\n")
    content = {
        "workload.target_metric_name": "accuracy",
        "workload.validation_target_value": 0.5,
        "workload.max_allowed_runtime_sec": 30.0,
        **(meta or {}),
    }
    (path / "meta_data_0.json").write_text(json.dumps(content))
    (path / "hparams.json").write_text("{}")
    return path


def test_the_target_itself_is_a_hit_and_the_first_one_counts(tmp_path):
    rows = [(1, 1.0, 0.1), (5, 5.0, 0.49999), (9, 9.5, 0.5), (13, 14.0, 0.4), (17, 18.0, 0.9)]
    trial = logs.read_trial(made_trial(tmp_path, rows))
    assert (trial.steps_to_target, trial.time_to_target) == (9, 9.5)


def test_rows_a_resumed_run_wrote_twice_count_once_and_are_said(tmp_path):
    rows = [(1, 1.0, 0.1, 0), (5, 5.0, 0.2, 0), (9, 9.0, 0.6, 0)]
    rows += [(5, 5.5, 0.2, 1), (9, 10.0, 0.4, 1)]
    trial = logs.read_trial(made_trial(tmp_path, rows))
    assert [(e.step, e.submission_time) for e in trial.evaluations] == [
        (1, 1.0),
        (5, 5.5),
        (9, 10.0),
    ]
    assert trial.outcome == "unknown"  # the hit at step 9 was on the lost branch
    assert any("step 5 is there twice" in hole for hole in trial.holes)


def test_a_resumed_run_may_go_back_in_time_too(tmp_path):
    """Evaluations are due by time: the branch that was left may have had one at another step."""
    rows = [(1, 1.0, 0.1, 0), (5, 5.0, 0.2, 0), (9, 9.1, 0.3, 0), (10, 9.0, 0.6, 1)]
    trial = logs.read_trial(made_trial(tmp_path, rows))
    assert [e.step for e in trial.evaluations] == [1, 5, 10]
    assert (trial.outcome, trial.steps_to_target) == ("hit", 10)
    assert any("1 rows were done again" in hole for hole in trial.holes)


def test_nan_is_no_hit_and_the_run_is_said_to_have_diverged(tmp_path):
    trial = logs.read_trial(made_trial(tmp_path, [(1, 10.0, "nan"), (5, 25.0, "")]))
    assert trial.outcome == "miss" and trial.diverged
    assert trial.holes == [
        "validation/accuracy is not finite at 2 of 2 evaluations, the first at step 1",
        "diverged",
    ]


def test_an_empty_csv_and_a_missing_target_are_holes(tmp_path):
    path = made_trial(tmp_path, [(1, 1.0, 0.1)])
    (path / "eval_measurements.csv").write_text("")
    assert "eval_measurements.csv has no header" in logs.read_trial(path).holes
    (path / "meta_data_0.json").write_text("{}")
    assert "no target in the meta data" in logs.read_trial(path).holes
    (path / "meta_data_0.json").write_text("{")
    holes = logs.read_trial(path).holes
    assert holes[0].startswith("meta_data_0.json is not valid JSON: line 1: ")


def test_a_run_ended_by_its_step_limit_is_a_miss(tmp_path):
    path = made_trial(tmp_path, [(1, 1.0, 0.1), (40, 4.0, 0.2)])
    assert logs.read_trial(path).outcome == "unknown"
    (path / "flags_0.json").write_text(json.dumps({"max_global_steps": 40}))
    assert logs.read_trial(path).outcome == "miss"


def embedded_trial(folder: Path, rows: list[tuple], status: str, result: dict) -> Path:
    """An embedded run's folder with a sealed record of these evaluations."""
    path = made_trial(folder, rows, {"rng_seed": 1})
    write_record(path, status, result)
    return path


def write_record(path: Path, status: str, result: dict, **changes) -> None:
    """A record of the files in a folder, as its names say but for ``changes`` of the identity."""
    meta = json.loads((path / "meta_data_0.json").read_text())
    names = ("target_metric_name", "validation_target_value")
    identity = {
        "variant": path.parents[2].name,
        "label": path.parents[2].name,
        "workload": path.parent.name.removesuffix("_pytorch"),
        "seed": meta["rng_seed"],
        "trial": int(path.name.removeprefix("trial_")),
        "hparams": json.loads((path / "hparams.json").read_text()),
        "workload_properties": {name: meta[f"workload.{name}"] for name in names},
        **changes,
    }
    record = {"identity": identity, "status": status, "result": result, "files": seal.make(path)}
    (path / "run.json").write_text(json.dumps(seal.signed(record)))


HIT = {"steps_to_target": 5, "time_to_target": 5.0, "global_step": 5}


def test_an_embedded_run_is_unfinished_until_its_record_says_so(tmp_path):
    rows = [(1, 1.0, 0.1), (5, 5.0, 0.6)]
    trial = logs.read_trial(embedded_trial(tmp_path / "a", rows, "running", {}))
    assert (trial.outcome, trial.holes) == ("unfinished", [])
    trial = logs.read_trial(embedded_trial(tmp_path / "b", rows, "finished", HIT))
    assert (trial.outcome, trial.source, trial.holes) == ("hit", "embedded", [])


def test_a_diverged_run_is_a_miss_and_marked(tmp_path):
    rows = [(1, 1.0, 0.1), (5, 5.0, "nan")]
    result = {"steps_to_target": None, "time_to_target": None, "global_step": 7}
    trial = logs.read_trial(embedded_trial(tmp_path, rows, "diverged", result))
    assert (trial.outcome, trial.diverged) == ("miss", True)
    assert trial.holes[-1] == "diverged (run.json)"


def test_finding_trials_below_folders(tmp_path):
    shutil.copytree(SHAMPOO / "study_0", tmp_path / "shampoo" / "study_0")
    (tmp_path / "trial_9").mkdir()
    found = logs.find_trials([tmp_path, tmp_path / "shampoo"])
    assert [(t.workload, t.trial) for t in found] == [
        ("fastmri", 1),
        ("fastmri", 2),
        ("imagenet_vit", 2),
        ("ogbg", 1),
        ("ogbg", 2),
    ]
    with pytest.raises(UserError, match="no such folder of runs"):
        logs.find_trials([tmp_path / "nothing"])
    with pytest.raises(UserError, match="no such folder of runs"):
        logs.find_trials([tmp_path / ("n" * 300)])
    with pytest.raises(UserError, match="not a folder study_K"):
        logs.read_trial(tmp_path)
