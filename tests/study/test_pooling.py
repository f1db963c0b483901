"""What makes a row, and that no run, nor a seed, counts twice in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from algoperf_shampoo.study import comparisons, differences, logs, tables
from tests.study.test_logs import SHAMPOO, made_trial, write_record

ROOT = Path(__file__).parents[2]
VARIANT = "eshampoo_adaptive"


def run(
    folder: Path,
    seed: int = 1,
    hit: int = 9,
    named: str = VARIANT,
    meta: dict | None = None,
    params: str = "",
    **changes,
) -> Path:
    """A finished mini run that hits at step ``hit``; ``changes`` of what its record says."""
    made = made_trial(
        folder / "made", [(1, 1.0, 0.1), (hit, hit + seed / 10, 0.6)],
        {"rng_seed": seed, **(meta or {})},
    )  # fmt: skip
    path = folder / named / f"study_{seed}" / "ogbg_mini_pytorch" / "trial_1"
    path.parent.mkdir(parents=True)
    made.rename(path)
    shutil.rmtree(folder / "made")
    result = {"steps_to_target": hit, "time_to_target": hit + seed / 10, "global_step": hit}
    write_record(path, "finished", {**result, "params_sha256": params or f"{seed}{hit}"}, **changes)
    return path


def rows_of(*roots: Path) -> list[tables.Row]:
    table = tables.table1(logs.find_trials(roots), ROOT)[0]
    return [row for row in table.rows if row.runs]


def properties(**more) -> dict:
    return {"target_metric_name": "accuracy", "validation_target_value": 0.5, **more}


def test_a_copy_under_another_seeds_name_is_a_fault(tmp_path):
    one = run(tmp_path)
    run(tmp_path, 2, 11)
    shutil.copytree(one.parents[1], tmp_path / VARIANT / "study_11")
    shutil.copytree(tmp_path / VARIANT / "study_2", tmp_path / VARIANT / "study_1", dirs_exist_ok=1)
    (row,) = rows_of(tmp_path)
    assert (row.values, len(row.runs)) == ([11], 3)
    notes = "\n".join(row.notes)
    assert 'run.json: seed is 2; the folder\'s name: "1": it holds a run of 2' in notes
    assert 'run.json: seed is 1; the folder\'s name: "11"' in notes


@pytest.mark.parametrize("backup", ["b", "a/old"])
def test_a_copy_below_another_folder_counts_once(tmp_path, backup):
    run(tmp_path / "a")
    run(tmp_path / "a", 2, 11)
    shutil.copytree(tmp_path / "a" / VARIANT, tmp_path / backup / VARIANT)
    (row,) = rows_of(tmp_path)
    assert (row.hits, row.ended, row.values, len(row.runs)) == (2, 2, [9, 11], 4)
    first = tmp_path / "a" / VARIANT / "study_1/ogbg_mini_pytorch/trial_1"
    assert f"study_1/trial_1: the same run as {first}" in row.notes


def test_a_run_done_again_to_the_same_parameters_counts_once(tmp_path):
    run(tmp_path / "a", params="p")
    again = run(tmp_path / "b", params="p")
    text = (again / "eval_measurements.csv").read_text().replace("1,1.0", "1,1.25")
    (again / "eval_measurements.csv").write_text(text)
    record = json.loads((again / "run.json").read_text())
    write_record(again, "finished", record["result"])
    (row,) = rows_of(tmp_path)
    assert row.values == [9] and any("the same run as" in note for note in row.notes)


def test_of_different_runs_of_one_seed_none_counts(tmp_path):
    run(tmp_path / "a", 1, 9)
    run(tmp_path / "b", 1, 7)
    run(tmp_path / "b", 2, 8)
    (row,) = rows_of(tmp_path)
    assert row.values == [8]
    assert sum("another run of seed 1 than" in note for note in row.notes) == 2


def test_a_copied_log_of_algoperfs_counts_once(tmp_path):
    for study in (0, 7):
        source = SHAMPOO / "study_0" / "fastmri_pytorch"
        shutil.copytree(source, tmp_path / "shampoo" / f"study_{study}" / source.name)
    found = [t for t in logs.find_trials([tmp_path]) if t.trial == 2]
    assert [t.outcome for t in found] == ["hit", "unknown"]
    assert found[1].holes[0].startswith("the same run as ")


def test_runs_sealed_under_algoperfs_harness_lie_in_their_seeds_folder(tmp_path):
    path = made_trial(tmp_path, [(1, 1.0, 0.1), (9, 9.0, 0.6)], {"rng_seed": 4})
    (path / "seal.json").write_text("{}")
    assert logs.read_trial(path).outcome == "unknown"
    meta = json.loads((path / "meta_data_0.json").read_text())
    (path / "meta_data_0.json").write_text(json.dumps({**meta, "rng_seed": 1}))
    assert logs.read_trial(path).outcome == "hit"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"label": "eshampoo_adaptive_F2"}, 'label is "eshampoo_adaptive_F2"; the folder'),
        ({"variant": "nadamw"}, 'variant is "nadamw"; the label: "eshampoo_adaptive"'),
        ({"trial": 2}, "it holds a run of 2"),
        ({"trial": True}, "it holds a run of true"),
        ({"workload": "fastmri_mini"}, 'it holds a run of "fastmri_mini"'),
        ({"framework": "jax"}, 'it holds a run of "jax"'),
    ],
)
def test_a_record_of_another_run_than_the_folders_say(tmp_path, changes, reason):
    trial = logs.read_trial(run(tmp_path, **changes))
    assert trial.outcome == "unknown" and any(reason in hole for hole in trial.holes), trial.holes


def test_the_embedded_harness_is_pytorchs(tmp_path):
    path = run(tmp_path)
    jax = path.parent.rename(path.parent.with_name("ogbg_mini_jax"))
    assert any('framework is "pytorch"' in h for h in logs.read_trial(jax / "trial_1").holes)


@pytest.mark.parametrize(
    ("meta", "changes"),
    [
        ({}, {"workload_properties": properties(max_steps=30)}),
        ({}, {"workload_config": {"data": {"sha256": "b" * 64}}}),
        ({"workload.max_allowed_runtime_sec": 20.0}, {}),
        ({"workload.validation_target_value": 0.4}, {}),
    ],
)
def test_runs_of_other_terms_are_another_row(tmp_path, meta, changes):
    usual = {"workload_properties": properties(max_steps=500)}
    usual["workload_config"] = {"data": {"sha256": "a" * 64}}
    if "workload.validation_target_value" in meta:
        changes = {"workload_properties": properties(max_steps=500, validation_target_value=0.4)}
    run(tmp_path / "a", 1, 9, **usual)
    run(tmp_path / "b", 2, 11, meta=meta, **{**usual, **changes})
    rows = rows_of(tmp_path)
    assert sorted(row.values for row in rows) == [[9], [11]]
    assert len({row.name for row in rows}) == 2 and rows[0].terms != rows[1].terms
    caption = tables.table1(logs.find_trials([tmp_path]), ROOT)[0].caption
    targets = {trial.target for trial in logs.find_trials([tmp_path])}
    assert all(f"ogbg_mini accuracy {target:g}" in caption for target in targets)


def test_rows_of_other_targets_are_not_compared(tmp_path):
    run(tmp_path, 1, 9, "shampoo_grafting")
    run(tmp_path, 1, 5)
    assert any(r.comparison for r in comparisons.annotate(tables.table1(
        logs.find_trials([tmp_path]), ROOT))[0].rows)  # fmt: skip
    shutil.rmtree(tmp_path / VARIANT)
    run(tmp_path, 1, 5, meta={"workload.validation_target_value": 0.4},
        workload_properties=properties(validation_target_value=0.4))  # fmt: skip
    made = comparisons.annotate(tables.table1(logs.find_trials([tmp_path]), ROOT))
    assert not any(row.comparison for row in made[0].rows)


def test_a_mini_without_a_record_is_a_fault(tmp_path):
    path = run(tmp_path)
    (path / "run.json").unlink()
    trial = logs.read_trial(path)
    assert trial.outcome == "unknown"
    assert trial.holes == ["no run.json, though the workload ogbg_mini is of the embedded harness"]


@pytest.mark.parametrize(
    ("label", "variant"),
    [
        (VARIANT, VARIANT),
        ("eshampoo_adaptive_F20_tau0.05_steps30_2026_allsteps_self", VARIANT),
        ("eshampoo_adaptive_1dadam_lambdaema_1-b3-beta2_eps1e-08", VARIANT),
        ("eshampoo_adaptive_mine", None),
        ("eshampoo_adaptive2", None),
        ("eshampoo_adaptive_F20_mine", None),
        ("mine", None),
    ],
)
def test_the_variant_of_a_label_without_a_record(tmp_path, label, variant):
    path = made_trial(tmp_path, [(1, 1.0, 0.1), (9, 9.0, 0.6)])
    path.parents[2].rename(tmp_path / label)
    (trial,) = logs.find_trials([tmp_path])
    assert differences.variant_of(trial, [VARIANT, "nadamw"]) == variant


def test_a_users_variant_does_not_take_the_papers_row(tmp_path):
    mine = f"{VARIANT}_mine"
    run(tmp_path, named=mine, variant=mine)
    (row,) = rows_of(tmp_path)
    assert row.paper is None and row.name == mine
    for table in tables.table3(logs.find_trials([tmp_path]), ROOT):
        assert not any(row.runs and row.paper for row in table.rows)
