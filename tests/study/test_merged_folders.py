"""Folders copied, merged, renamed and saved anew by hand: no run counts twice, nor in another's
place, and what made a row's runs is said where they differ."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from algoperf_shampoo.harness import seal
from algoperf_shampoo.study import comparisons, logs, tables
from algoperf_shampoo.study.tables import Row
from tests.study.test_logs import SHAMPOO, made_trial

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "results" / "measured" / "mini" / "seeds"
EVALS = "eval_measurements.csv"


def published(folder: Path, label: str = "shampoo", study: int = 0, workload="ogbg") -> Path:
    """A copy of a published trial that hit; study K of three."""
    there = f"study_{study}/{workload}_pytorch/trial_2"
    shutil.copytree(SHAMPOO / there, folder / label / there)
    return folder / label / there


def mini(folder: Path, label: str, seed: int) -> Path:
    there = f"{label}/study_{seed}/ogbg_mini_pytorch/trial_1"
    shutil.copytree(SEEDS / there, folder / there)
    return folder / there


def rows_of(*roots: Path) -> list[Row]:
    made = comparisons.annotate(tables.table1(logs.find_trials(roots), ROOT))
    return [row for table in made for row in table.rows if row.runs]


def saved_anew(path: Path, change: Callable[[dict[str, str]], None] = lambda row: None, **how):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        change(row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **{"lineterminator": "\n", **how})
        writer.writeheader()
        writer.writerows(rows)


def rounded(row: dict[str, str]) -> None:
    row |= {name: f"{float(text):.6g}" for name, text in row.items() if text}


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    "again",
    [
        lambda path: saved_anew(path, lineterminator="\r\n"),
        lambda path: saved_anew(path, quoting=csv.QUOTE_ALL),
        lambda path: saved_anew(path, lambda row: row.update(index="1")),
        lambda path: saved_anew(path, rounded),
        lambda path: path.write_text("\ufeff" + path.read_text()),
        cut,
    ],
    ids=["crlf", "quoted", "a column more", "six digits", "bom", "without its last row"],
)
def test_a_copy_that_was_saved_anew_counts_once(tmp_path, again):
    for study in range(3):
        published(tmp_path, study=study)
    (whole,) = rows_of(tmp_path)
    shutil.copytree(tmp_path / "shampoo/study_0", tmp_path / "shampoo/study_7")
    again(tmp_path / "shampoo/study_7/ogbg_pytorch/trial_2" / EVALS)
    (row,) = rows_of(tmp_path)
    assert (row.steps, row.seconds, len(row.runs)) == (whole.steps, whole.seconds, 4)
    assert any("study_7/trial_2: the same run as " in note for note in row.notes)


def test_a_copy_without_its_record_counts_after_the_run_that_has_one(tmp_path):
    own = published(tmp_path / "b", "shampoo_grafting")
    meta = json.loads((own / "meta_data_0.json").read_text())
    (own / "meta_data_0.json").write_text(json.dumps({**meta, "rng_seed": 0}))
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    (own / "seal.json").write_text(json.dumps(seal.signed({"files": seal.make(own)})))
    copy, whole = logs.find_trials([tmp_path])
    assert (copy.recorded, whole.recorded) == (False, True)
    assert (copy.outcome, whole.outcome) == ("unknown", "hit")
    # Under another label too: the record says which of the two is right.
    shutil.move(tmp_path / "a/shampoo_grafting", tmp_path / "a/eshampoo_fixed")
    copy, whole = logs.find_trials([tmp_path])
    assert (copy.outcome, whole.outcome) == ("unknown", "hit")
    assert copy.holes[-1].endswith("which is of another row")


@pytest.mark.parametrize("label", ["eshampoo_fixed", "sh\u0430mpoo"])
def test_one_log_under_two_labels_counts_under_neither(tmp_path, label):
    for study in range(2):
        published(tmp_path, study=study)
    published(tmp_path, label)
    by_label = {row.label: row for row in rows_of(tmp_path)}
    first, second = by_label["shampoo trial 2"], by_label[f"{label} trial 2"]
    assert (len(first.values), len(second.values)) == (1, 0)
    for row in (first, second):
        assert sum("which is of another row: neither is counted" in n for n in row.notes) == 1
    look = [note for row in by_label.values() for note in row.notes if "the label is" in note]
    assert look == ([] if label.isascii() else ["study_0/trial_2: the label is 'sh\\u0430mpoo'"])


def test_logs_that_begin_alike_and_part_are_two(tmp_path):
    for seed, third in enumerate((11.0, 11.5)):
        rows = [(1, 1.0, 0.1), (5, 5.0, 0.2), (9, third, 0.3), (13, 14.0, 0.6)]
        made_trial(tmp_path / f"{seed}", rows)
    assert [t.outcome for t in logs.find_trials([tmp_path])] == ["hit", "hit"]


@pytest.mark.parametrize(
    ("flags", "sealed", "reason"),
    [
        ({"workload": "fastmri"}, False, 'workload is "fastmri"; the folder\'s name: "ogbg"'),
        ({"framework": "jax"}, False, 'framework is "jax"; the folder\'s name: "pytorch"'),
        ({"experiment_name": "study_3"}, True, 'experiment_name is "study_3"; the folder'),
        ({"experiment_dir": "/runs/nadamw"}, True, 'experiment_dir is "nadamw"; the folder'),
        (
            {"submission_path": "submissions/nadamw/submission.py"}, True,
            'submission_path is "submissions/nadamw/submission.py"; the label: "shampoo_grafting"',
        ),
    ],
)  # fmt: skip
def test_a_log_in_folders_of_another_name(tmp_path, flags, sealed, reason):
    path = published(tmp_path, "shampoo_grafting")
    meta = json.loads((path / "meta_data_0.json").read_text())
    (path / "meta_data_0.json").write_text(json.dumps({**meta, "rng_seed": 0}))
    right = {
        "workload": "ogbg", "framework": "pytorch", "experiment_name": "study_0",
        "experiment_dir": "/runs/shampoo_grafting", "tuning_ruleset": "external",
        "submission_path": "submissions/shampoo_grafting/submission.py",
    }  # fmt: skip
    for said, outcome in ((right, "hit"), ({**right, **flags}, "unknown")):
        (path / "flags_0.json").write_text(json.dumps(said))
        if sealed:
            (path / "seal.json").write_text(json.dumps(seal.signed({"files": seal.make(path)})))
        trial = logs.read_trial(path)
        assert trial.outcome == outcome, trial.holes
    assert f"flags_*.json: {reason}" in "\n".join(trial.holes)


def test_a_workload_is_known_by_its_metric_without_flags(tmp_path):
    path = published(tmp_path).parent
    trial = logs.read_trial(path.rename(path.with_name("fastmri_pytorch")) / "trial_2")
    assert trial.outcome == "unknown" and trial.steps_to_target is None
    assert "is mean_average_precision; that of fastmri: ssim" in trial.holes[0]


def test_a_target_that_is_reached_after_the_budget_is_none(tmp_path):
    path = made_trial(tmp_path, [(1, 1.0, 0.1), (9, 31.0, 0.6)])
    flags = path / "flags_0.json"
    assert logs.read_trial(path).outcome == "hit"  # no flags: it may be self-tuning, with 90 s
    flags.write_text(json.dumps({"tuning_ruleset": "self"}))
    assert logs.read_trial(path).outcome == "hit"
    flags.write_text(json.dumps({"tuning_ruleset": "external"}))
    trial = logs.read_trial(path)
    assert trial.outcome == "unknown"
    assert trial.holes == ["the target is reached after 31 s, and the budget is 30"]
    flags.write_text(json.dumps({"tuning_ruleset": "self", "max_global_steps": 8}))
    trial = logs.read_trial(path)
    assert trial.holes == ["the target is reached at step 9, and max_global_steps is 8"]


def test_what_made_the_runs_is_said_where_a_row_mixes_it(tmp_path):
    for seed in (1, 2, 3):
        path = mini(tmp_path, "eshampoo_fixed", seed)
    mini(tmp_path, "shampoo_grafting", 1)
    assert not [note for row in rows_of(tmp_path) for note in row.notes]
    record = json.loads((path / "run.json").read_text())
    record["sessions"][0]["packages"]["torch"] = "2.5.0"
    record["sessions"].append({**record["sessions"][0], "packages": {"torch": "2.6.0"}})
    record["identity"]["source_sha256"]["optimizer"] = "0" * 64
    (path / "run.json").write_text(json.dumps(seal.signed(record)))
    own = next(row for row in rows_of(tmp_path) if row.label == "eshampoo_fixed")
    assert own.ended == 3
    source = next(iter(own.made_by["optimizer source"]))
    assert own.notes == [
        f"its runs differ in optimizer source: {source} (2), 000000000000 (1)",
        "its runs differ in torch: 2.13.0+cpu (2), 2.5.0, then 2.6.0 (1)",
        "compared with shampoo_grafting, whose runs differ in optimizer source, torch",
    ]


def test_what_made_runs_under_algoperfs_harness_is_in_their_launches(tmp_path):
    for study, torch in ((0, "2.11.0"), (1, "2.13.0")):
        path = published(tmp_path, study=study)
        launch = {"torch": torch, "gpus": ["H100"] * 8, "algoperf_commit": "abc", "how": "finished"}
        (path / "launches.json").write_text(json.dumps([launch, "odd"]))
    (row,) = rows_of(tmp_path)
    assert row.notes == ["its runs differ in torch: 2.11.0 (1), 2.13.0 (1)"]
    assert row.made_by["GPUs"] == {"8 x H100": 2}
    for content in (b"{", b"[[[", b'"text"', gzip.compress(b"[]")):
        (path / "launches.json").write_bytes(content)
        assert logs.read_trial(path).outcome == "hit"
