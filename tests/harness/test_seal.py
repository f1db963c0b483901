"""Seals: an untouched folder has no problem, any change of a sealed file is one."""

from __future__ import annotations

import json
import random

import pytest

from algoperf_shampoo.harness import run_folder, seal
from tests.harness import fakes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = fakes.spec_in(tmp_path_factory.mktemp("run"))
    fakes.execute(run)
    files = {path.name: path.read_bytes() for path in run.run_dir.iterdir()}
    return files, json.loads(files["run.json"])


@pytest.fixture
def folder(finished, tmp_path):
    for name, data in finished[0].items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_finished_run_is_sealed_wholly(finished, folder):
    record = finished[1]
    assert set(record["files"]) == {
        "eval_measurements.csv",
        "measurements.csv",
        "step_losses.csv",
        "hparams.json",
        "meta_data_0.json",
        "flags_0.json",
    }
    assert record["files"]["eval_measurements.csv"]["rows"] == 5
    assert record["files"]["step_losses.csv"]["rows"] == 40
    assert record["files"]["hparams.json"]["rows"] is None
    assert seal.make(folder) == record["files"]
    for ended in (True, False):
        assert seal.problems(folder, record, ended) == []


def test_any_changed_byte_of_any_sealed_file_is_seen(finished, folder):
    draw = random.Random(1)
    for name, sealed in finished[1]["files"].items():
        data = finished[0][name]
        for _ in range(20):
            at = draw.randrange(sealed["bytes"])
            changed = bytes([data[at] ^ (1 << draw.randrange(8))])
            (folder / name).write_bytes(data[:at] + changed + data[at + 1 :])
            assert [p.split(":")[0] for p in seal.problems(folder, finished[1], True)] == [name]
        (folder / name).write_bytes(data)
    assert seal.problems(folder, finished[1], True) == []


def test_rows_lost_added_and_files_gone_or_new(finished, folder):
    record, evals = finished[1], finished[0]["eval_measurements.csv"]
    path = folder / "eval_measurements.csv"
    path.write_bytes(b"".join(evals.splitlines(keepends=True)[:-1]))
    (problem,) = seal.problems(folder, record, True)
    assert problem.startswith("eval_measurements.csv: ") and "4 of 5 rows are there" in problem
    assert seal.problems(folder, record, False) == [problem]
    path.write_bytes(evals + b"1,2\n")
    assert "added to" in seal.problems(folder, record, True)[0]
    assert seal.problems(folder, record, False) == []
    path.unlink()
    assert "cannot be read" in seal.problems(folder, record, False)[0]
    path.write_bytes(evals)
    (folder / "flags_7.json").write_text("{}")
    assert seal.problems(folder, record, True)[0].startswith("flags_7.json: ")
    assert seal.problems(folder, record, False) == []


def test_a_changed_record_is_seen_and_one_without_a_digest_is_no_problem(finished, folder):
    record = finished[1]
    for changed in (
        {**record, "status": "running"},
        {**record, "files": {}},
        {key: value for key, value in record.items() if key != "files"},
        {key: value for key, value in record.items() if key != "record_sha256"},
        {**record, "record_sha256": 3},
    ):
        assert "the record has been changed" in seal.problems(folder, changed, True)[0]
    old = {k: v for k, v in record.items() if k not in ("files", "record_sha256")}
    assert seal.problems(folder, old, True) == []
    for files in ([], {"a": 1}, {"eval_measurements.csv": {"bytes": -1}}):
        assert seal.problems(folder, seal.signed({**old, "files": files}), True)
    outside = seal.signed({**old, "files": {"../x": seal.entry(b"", "x")}})
    assert "no file of a run" in seal.problems(folder, outside, True)[0]


def test_an_unfinished_run_is_sealed_up_to_its_last_evaluation(tmp_path):
    from tests.harness.test_runner import interrupted

    run = interrupted(tmp_path, step=25)
    record = run_folder.read_record(run.run_dir)
    assert record["status"] == "running"
    assert record["files"]["step_losses.csv"]["rows"] == 20
    assert record["files"]["eval_measurements.csv"]["rows"] == 3
    assert seal.problems(run.run_dir, record, False) == []
