"""What a log may be instead of a log: each fault is a hole of its own run, with a reason."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from algoperf_shampoo.harness import seal
from algoperf_shampoo.study import (
    comparisons,
    evaluations,
    files,
    logs,
    table_files,
    table_text,
    tables,
)
from tests.study.test_logs import COLUMNS, HIT, embedded_trial, made_trial

ROOT = Path(__file__).parents[2]
ROWS = [(1, 1.0, 0.1), (5, 5.0, 0.3), (9, 9.0, 0.6)]
CSV, META = "eval_measurements.csv", "meta_data_0.json"


def not_counted(path: Path, *reasons: str) -> logs.Trial:
    """Read a trial of which nothing may be counted, and of which these holes are said."""
    trial = logs.read_trial(path)
    assert (trial.outcome, trial.steps_to_target, trial.time_to_target) == ("unknown", None, None)
    for reason in reasons:
        assert any(reason in hole for hole in trial.holes), (reason, trial.holes)
    written(path)
    return trial


def written(*paths: Path) -> str:
    """The tables of some trials in all their forms; the Markdown."""
    made = comparisons.annotate(tables.table1([logs.read_trial(path) for path in paths], ROOT))
    json.loads(
        table_files.to_json(made), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    for text in (
        table_files.to_csv(made),
        *map(table_text.render, made),
        table_files.to_markdown(made),
    ):
        text.encode("utf-8")
    return table_files.to_markdown(made)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("inf", 1.0, 0.1)], "line 2: global_step is 'inf': not a whole number"),
        ([(-1, 1.0, 0.1)], "line 2: global_step is '-1'"),
        ([("1.5", 1.0, 0.1)], "line 2: global_step is '1.5'"),
        ([("1e300", 1.0, 0.1)], "line 2: global_step is '1e300'"),
        ([("", 1.0, 0.1)], "line 2: global_step is empty"),
        ([("1_0", 1.0, 0.1)], "line 2: global_step is '1_0'"),
        ([("\u0661", 1.0, 0.1)], "line 2: global_step is '\u0661'"),
        ([("9" * 5000, 1.0, 0.1)], "line 2: global_step is '999"),
        ([(1, "nan", 0.1)], "line 2: accumulated_submission_time is 'nan'"),
        ([(1, "inf", 0.1)], "accumulated_submission_time is 'inf'"),
        ([(1, "1e300", 0.1)], "accumulated_submission_time is '1e300'"),
        ([(1, -3575.0, 0.9)], "accumulated_submission_time is '-3575.0': not a time of 0 to"),
        ([(1, 1.0, "1_0")], "line 2: validation/accuracy is '1_0': not a number"),
        ([(1, 1.0, "\u0661\u0660")], "validation/accuracy is '\u0661\u0660': not a number"),
        ([(1, 1.0, " 0.9")], "validation/accuracy is ' 0.9': not a number"),
        ([(1, 1.0, "1e-400")], "validation/accuracy is '1e-400': not a number"),
        ([(1, 1.0, 7.0)], "validation/accuracy is '7.0': outside 0 to 1"),
        ([(1, 1.0, 0.1, "x")], "preemption_count is 'x': not a count"),
        ([(3, 1.0, 0.9)], "begins at step 3: the evaluation after step 1 is not there"),
        (
            [(1, 1.0, 0.1), (5, 9.0, 0.2), (9, 5.0, 0.9)],
            "line 4: accumulated_submission_time falls from 9.0 to 5.0 s while steps rise",
        ),
        ([(1, 1.0, 0.1), (9, 5.0, 0.2), (5, 9.0, 0.9)], "line 4: global_step falls: 5 after 9"),
        ([(1, 1.0, 0.1), (1, 5.0, 0.9)], "line 3: global_step is there twice: 1 after 1"),
        ([(1, 1.0, 0.1, 1), (5, 5.0, 0.9, 0)], "line 3: preemption_count falls from 1 to 0"),
        ([(1, 1.0, 0.1), (5, "", ""), (9, 9.0, 0.7)], "line 3: accumulated_submission_time"),
        ([], "eval_measurements.csv has no evaluations below its header"),
    ],
)
def test_rows_that_break_type_range_or_order(tmp_path, rows, reason):
    not_counted(made_trial(tmp_path, rows), reason)


@pytest.mark.parametrize("value", ["inf", "-inf", "1e999", "Infinity", "nan", ""])
def test_a_metric_that_is_not_finite_is_no_hit(tmp_path, value):
    trial = logs.read_trial(made_trial(tmp_path, [(1, 10.0, 0.1), (5, 25.0, value)]))
    assert (trial.outcome, trial.steps_to_target, trial.diverged) == ("miss", None, True)
    assert "is not finite at 1 of 2 evaluations, the first at step 5" in trial.holes[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe", "eval_measurements.csv line 1 is not UTF-8 (byte 0)"),
        (b"", "eval_measurements.csv has no header"),
        (b"\n\n", "eval_measurements.csv has no header"),
        (COLUMNS.encode(), "line 1 is cut short"),
        (COLUMNS.encode() + b"\n", "has no evaluations below its header"),
        (COLUMNS.encode() + b"\n1,1.0,0.1,0\n5,2.0,0.9", "line 3: 3 fields, the header has 4"),
        (COLUMNS.encode() + b"\n1,1.0,0.1,0\n5,2.0,0.9,0", "line 3 is cut short"),
        (COLUMNS.encode() + b"\n1,1.0,0.1,0\n\n5,2.0,0.9,0\n", "line 3: 0 fields"),
        (COLUMNS.encode() + b"\n1,1.0,0.1,0\n5,2\xff.0,0.9,0\n", "line 3 is not UTF-8"),
        (COLUMNS.encode() + b"\n1,1.0,0.1,0\n5,2.0,\0,0\n", "validation/accuracy is '\\x00'"),
        (COLUMNS.encode() + b'\n1,1.0,0.1,0\n5,2.0,"0.9,0\n', "unexpected end of data"),
        (COLUMNS.encode() + b"\n1,1.0,0.1," + b"0" * 140_000 + b"\n", "field larger than"),
        (COLUMNS.encode() + b",global_step\n1,1,1,1,1\n", "has the column global_step twice"),
        (b"a,b\n1,2\n", "no column global_step, accumulated_submission_time, validation/accuracy"),
        (b"," * 20_000 + b"\n", "has 20001 columns"),
    ],
)
def test_a_csv_that_is_none(tmp_path, content, reason):
    path = made_trial(tmp_path, ROWS)
    (path / CSV).write_bytes(content)
    not_counted(path, reason)


@pytest.mark.parametrize(
    "value", ["0.5", [0.5], {"a": 1}, True, float("nan"), float("inf"), 10**400]
)
def test_a_target_that_is_no_number(tmp_path, value):
    path = made_trial(tmp_path, ROWS, {"workload.validation_target_value": value})
    not_counted(path, "meta" if value == 10**400 else "the target in the meta data is")


@pytest.mark.parametrize("value", [None, "30", [], {}, True, float("nan"), -1.0, 0, 10**400])
def test_a_budget_that_is_no_number(tmp_path, value):
    path = made_trial(tmp_path, ROWS[:2], {"workload.max_allowed_runtime_sec": value})
    not_counted(path, "meta" if value == 10**400 else "the time budget in the meta data is")


@pytest.mark.parametrize("value", ["quality", 3, [], {}, "\ud800", "a\nb", "x" * 10_000])
def test_a_metric_nobody_knows(tmp_path, value):
    path = made_trial(tmp_path, ROWS, {"workload.target_metric_name": value})
    trial = not_counted(path, "the metric in the meta data is")
    assert all(len(hole) <= 600 for hole in trial.holes)


@pytest.mark.parametrize("name", [META, "flags_0.json", "hparams.json", "run.json", "seal.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff", "is not UTF-8"),
        (b"{", "is not valid JSON: line 1"),
        (b"", "is not valid JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds null"),
        (b"[" * 100_000, "is nested deeper than 32 levels"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "is nested deeper than 32 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": ' + b"9" * 400 + b"}", "holds an integer of 400 digits"),
        (b'{"a": -0.0, "b": 1e-400}', "holds 1e-400, which no float64 does"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
    ],
)
def test_a_json_that_is_none(tmp_path, name, content, reason):
    path = made_trial(tmp_path, ROWS)
    (path / name).write_bytes(content)
    not_counted(path, f"{name} ", reason)


@pytest.mark.parametrize(
    "text",
    [
        '{"lr": [NaN]}',
        '{"lr": {"a": "\\ud800"}}',
        '{"lr": NaN}',
        '{"lr": 1e999}',
        '{"lr": "a\\nb"}',
        '{"\\ud800": 1}',
    ],
)
def test_a_point_that_no_table_could_hold(tmp_path, text):
    path = made_trial(tmp_path, ROWS)
    (path / "hparams.json").write_text(text)
    not_counted(path, "hparams.json")


ENTRIES = {
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "dangling link": lambda path: path.symlink_to(path.parent / "nothing"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", [CSV, META, "hparams.json", "run.json", "measurements.csv"])
def test_an_entry_that_is_no_file(tmp_path, name, entry):
    path = made_trial(tmp_path, ROWS)
    (path / name).unlink(missing_ok=True)
    ENTRIES[entry](path / name)
    if (name, entry) == ("measurements.csv", "dangling link"):
        assert logs.read_trial(path).outcome == "hit"  # there need not be one
    else:
        not_counted(path, name)


def test_files_that_may_not_be_opened_or_are_too_large(tmp_path, monkeypatch):
    path = made_trial(tmp_path, ROWS)
    monkeypatch.setattr(files, "MAX_CSV_BYTES", 50)
    not_counted(path, "eval_measurements.csv is larger than 50 bytes")
    real = os.open

    def refuse(name, *arguments, **more):
        if str(name).endswith(".csv"):
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    not_counted(path, "eval_measurements.csv cannot be read: Permission denied")


def test_a_folder_that_may_not_be_listed_is_a_hole_and_the_others_are_read(tmp_path, monkeypatch):
    good = made_trial(tmp_path / "good", ROWS)
    closed = made_trial(tmp_path / "closed", ROWS)
    real = os.listdir

    def refuse(path):
        if Path(path) in (closed, tmp_path / "closed_label"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    (tmp_path / "closed_label").mkdir()
    monkeypatch.setattr(os, "listdir", refuse)
    said: list[str] = []
    trials = {t.path: t for t in logs.find_trials([tmp_path], said.append)}
    assert trials[good].outcome == "hit" and trials[closed].outcome == "unknown"
    assert trials[closed].holes[0] == "the folder cannot be read: Permission denied"
    assert said == [f"{tmp_path / 'closed_label'}: left out: Permission denied"]


@pytest.mark.parametrize("name", [b"label\xff", b"label\x1b[31m", "l\u00e4bel".encode(), b"a\nb"])
def test_folder_names_that_are_no_text(tmp_path, name):
    folder = os.fsencode(tmp_path) + b"/" + name
    os.makedirs(folder)
    path = made_trial(Path(os.fsdecode(folder)), ROWS)
    path.parents[2].rename(os.fsdecode(folder) + "/" + os.fsdecode(name))
    (found,) = logs.find_trials([tmp_path])
    assert found.outcome == "hit" and found.label.isprintable()
    assert all(line.isprintable() for line in written(found.path).splitlines())


@pytest.mark.parametrize("number", ["\u0663", "\u00b2", "1_0"])
def test_folder_numbers_of_other_scripts_are_no_trials(tmp_path, number):
    path = made_trial(tmp_path, ROWS)
    path.rename(path.with_name(f"trial_{number}"))
    assert logs.find_trials([tmp_path]) == []


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    path = made_trial(tmp_path / "elsewhere", ROWS)
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "linked").symlink_to(path.parents[2])
    (runs / "again").symlink_to(runs)
    (runs / "self").symlink_to(runs / "self")
    said: list[str] = []
    assert [t.label for t in logs.find_trials([runs], said.append)] == ["linked"]
    assert said == [f"{runs / 'again'}: a link to a folder that is read already"]
    # Its own path, where that is among the roots as well; whatever their order.
    for roots in ([runs, tmp_path / "elsewhere"], [tmp_path / "elsewhere", runs], [tmp_path]):
        assert [t.path for t in logs.find_trials(roots)] == [path]


def test_a_trial_at_the_root_of_a_file_system_has_a_label(monkeypatch):
    monkeypatch.setattr(logs, "is_trial", lambda path: True)
    trial = logs.read_trial(Path("/w_pytorch/trial_1"))
    assert trial.outcome == "unknown" and trial.label == ""


def test_a_finished_run_that_lost_its_last_evaluation_is_not_counted(tmp_path):
    """What ``sed -i '$d' eval_measurements.csv`` does."""
    path = embedded_trial(tmp_path, [(1, 1.0, 0.1), (5, 5.0, 0.6)], "finished", HIT)
    lines = (path / CSV).read_text().splitlines(keepends=True)
    (path / CSV).write_text("".join(lines[:-1]))
    not_counted(path, "1 of 2 rows are there")
    # An older record, without digests, has the outcome.
    record = json.loads((path / "run.json").read_text())
    del record["files"], record["record_sha256"]
    (path / "run.json").write_text(json.dumps(record))
    not_counted(path, "run.json: steps_to_target is 5; eval_measurements.csv: null")


def test_a_changed_digit_is_seen_by_the_digest(tmp_path):
    path = embedded_trial(tmp_path, [(1, 1.0, 0.1), (5, 5.0, 0.6)], "finished", HIT)
    (path / CSV).write_text((path / CSV).read_text().replace("0.6", "0.7"))
    not_counted(path, "eval_measurements.csv: has been changed since it was written")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["result"].update(steps_to_target=9), "steps_to_target is 9; eval_measure"),
        (lambda r: r["result"].update(time_to_target=9.0), "time_to_target is 9.0"),
        (lambda r: r["result"].update(global_step=1), "global_step is 1; last step in"),
        (lambda r: r["result"].update(global_step="5"), 'global_step is "5"'),
        (lambda r: r.update(result=[]), "run.json: result is [], not an object"),
        (lambda r: r.update(identity=None), "run.json: identity is null, not an object"),
        (lambda r: r["identity"].update(seed=2), "run.json: seed is 2; meta_data_0.json: 1"),
        (lambda r: r["identity"].update(workload="v"), 'workload is "v"; the folder\'s name: "w"'),
        (lambda r: r["identity"].update(hparams={"lr": 1}), 'hparams is {"lr": 1}; hparams.json'),
        (
            lambda r: r["identity"]["workload_properties"].update(validation_target_value=0.1),
            "validation_target_value is 0.1; meta_data_0.json: 0.5",
        ),
    ],
)
def test_a_record_that_disagrees_with_the_files(tmp_path, change, reason):
    path = embedded_trial(tmp_path, [(1, 1.0, 0.1), (5, 5.0, 0.6)], "finished", HIT)
    record = json.loads((path / "run.json").read_text())
    change(record)
    (path / "run.json").write_text(json.dumps(record))
    not_counted(path, "its own digest differs")
    del record["files"], record["record_sha256"]
    (path / "run.json").write_text(json.dumps(record))
    not_counted(path, reason)


def test_runs_under_algoperfs_harness_are_held_to_their_seal(tmp_path):
    path = made_trial(tmp_path, ROWS)
    record = {"format": 1, "files": seal.make(path)}
    (path / "seal.json").write_text(json.dumps(seal.signed(record)))
    assert (logs.read_trial(path).outcome, logs.read_trial(path).holes) == ("hit", [])
    (path / "hparams.json").write_text('{"learning_rate": 1.0}')
    not_counted(path, "hparams.json: has been changed since it was written")


@pytest.mark.parametrize("entry", ["pipe", "folder", "endless device"])
def test_a_sealed_file_that_became_something_else(tmp_path, entry):
    path = embedded_trial(tmp_path, [(1, 1.0, 0.1), (5, 5.0, 0.6)], "finished", HIT)
    (path / "hparams.json").unlink()
    ENTRIES[entry](path / "hparams.json")
    not_counted(path, "hparams.json: is no regular file")


def test_sessions_of_different_targets_are_not_one_run(tmp_path):
    path = made_trial(tmp_path, ROWS)
    meta = json.loads((path / META).read_text())
    (path / "meta_data_1.json").write_text(json.dumps(meta))
    assert logs.read_trial(path).outcome == "hit"
    meta["workload.validation_target_value"] = 0.4
    (path / "meta_data_1.json").write_text(json.dumps(meta))
    not_counted(path, "validation_target_value is 0.5 in meta_data_0.json and 0.4 in meta_data_1")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda lines: lines[:-1], None),  # what only the other file has left: no cell is of it
        (lambda lines: [*lines, "13,13.0,0.7,0\n"], "lacks 1 of the 4 evaluations in measure"),
        (lambda lines: [*lines[:-1], "9,9.5,0.6,0\n"], "disagree on evaluation 3: step 9, 9.0 s"),
        (lambda lines: [*lines, "13,13.0,0.7\n"], "measurements.csv line 5: 3 fields"),
        (lambda lines: [*lines, "x,13.0,0.7,0\n"], "measurements.csv line 5: step, time or"),
    ],
)
def test_both_files_of_measurements_must_agree(tmp_path, change, reason):
    path = made_trial(tmp_path, ROWS)
    lines = (path / CSV).read_text().splitlines(keepends=True)
    (path / "measurements.csv").write_text("".join(change(lines)))
    if reason is None:
        assert (logs.read_trial(path).outcome, logs.read_trial(path).holes) == ("hit", [])
    else:
        not_counted(path, reason)


def test_a_score_that_is_not_the_time(tmp_path):
    path = made_trial(tmp_path, [])
    (path / CSV).write_text(COLUMNS + ",score\n1,1.0,0.9,0,2.0\n")
    not_counted(path, "line 2: score is '2.0': not accumulated_submission_time, 1")


def test_metrics_where_lower_is_better(tmp_path):
    meta = {"workload.target_metric_name": "wer", "workload.validation_target_value": 0.2}
    path = made_trial(tmp_path, [], meta)
    rows = "1,1.0,1.4,0\n5,5.0,0.3,0\n9,9.0,0.1,0\n"
    (path / CSV).write_text(COLUMNS.replace("accuracy", "wer") + "\n" + rows)
    assert logs.read_trial(path).steps_to_target == 9
    assert evaluations.METRICS["loss"].reaches(0.1, 0.1)
    assert not evaluations.METRICS["loss"].reaches(float("-inf"), 0.1)


def test_one_bad_log_does_not_touch_the_cell_of_the_others(tmp_path):
    good = made_trial(tmp_path / "a", ROWS)
    bad = made_trial(tmp_path / "b", [("inf", 1.0, 0.9)])
    (row,) = tables.build([logs.read_trial(p) for p in (good, bad)], [], ["full"], tmp_path)[0].rows
    assert (row.hits, row.ended, row.steps) == (1, 1, tables.Estimate(9.0, None, 1))
    assert row.notes[0].startswith("1 of 2 runs not counted") and len(row.notes) == 2
