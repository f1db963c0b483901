"""The real scripts on bad input: one line, exit code 2, nothing touched."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from algoperf_shampoo import paths
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import disk
from algoperf_shampoo.study import table_files

ROOT = Path(__file__).parents[2]


def run(
    *arguments: str, script: str = "submit.py", **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def assert_refused(done: subprocess.CompletedProcess, named: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--variant=shampo"], "VARIANT=shampo: there is eshampoo_adaptive, eshampoo_fixed"),
        ([], "VARIANT=: there is"),
        (
            ["--variant=nadamw", "--workload=mnist"],
            "WORKLOAD=mnist: there is fastmri, imagenet_vit",
        ),
        (["--variant=nadamw", "--size=huge"], "SIZE=huge: there is mini, full"),
        (["--variant=nadamw", "--harness=own"], "HARNESS=own: there is embedded, algoperf"),
        (["--variant=nadamw", "--size=full", "--harness=embedded"], "SIZE=full HARNESS=embedded"),
        (["--variant=eshampoo_fixed", "--f=0"], "F=0: the number of steps between checks"),
        (["--variant=eshampoo_fixed", "--f=ten"], "F=ten"),
        (["--variant=eshampoo_adaptive", "--tau=1.5"], "TAU=1.5: the threshold of Eq. 11"),
        (["--variant=eshampoo_adaptive", "--tau=1e-400"], "TAU=1e-400: the threshold of Eq. 11"),
        (["--variant=eshampoo_adaptive", "--set=tau=1e-400"], 'tau is "1e-400": it must be'),
        (["--variant=nadamw", "--dry_run=2"], "DRY_RUN=2: 1, or 0 as without it"),
        (["--variant=nadamw", "--f=5"], "precondition_frequency is a field that this variant"),
        (["--variant=nadamw", "--seeds=abc"], "SEEDS=abc: a count such as 3"),
        (["--variant=nadamw", "--gpus=0"], "GPUS=0: an integer of at least 1"),
        (["--variant=nadamw", "--gpus=2"], "GPUS=2: the embedded harness is one process"),
        (["--variant=nadamw", "--trials=0"], "TRIALS=0"),
        (["--variant=nadamw", "--data_dir=no/such"], "DATA_DIR=no/such: no such folder"),
        (["--variant=nadamw", "--search_space=~nobody-here"], "SEARCH_SPACE=~nobody-here: no home"),
        (["--variant=nadamw", "--data_dir=~nobody-here"], "DATA_DIR=~nobody-here: no home folder"),
        (["--variant=nadamw", "--search_space=none.json"], "no such search space file"),
        (["--variant=nadamw", "--set=lr=1"], 'SET: "lr" is no field'),
        (["--variant=nadamw", "--set=tau=0.1"], "SET: tau is a field that this variant does not"),
        (["--variant=nadamw", "--set=use_nadam=no"], 'SET: use_nadam is "no": it must be true'),
        (["--variant=nadamw", "--steps=abc"], "STEPS=abc: an integer of at least 1"),
        (["--variant=nadamw", f"--steps={'9' * 5000}"], "STEPS=999"),
        (["--variant=nadamw", "--steps=501"], "STEPS=501: the budget of fastmri_mini is 500"),
        (["--variant=nadamw", "--processes=2"], "PROCESSES=2: the embedded harness is one process"),
        (["--variant=nadamw", "--ruleset=self"], "RULESET=self: HARNESS=algoperf has rulesets"),
        (["--variant=nadamw", f"--seeds={'9' * 5000}"], "SEEDS=999"),
        (["--variant=nadamw", "--search_space=/dev/zero"], "/dev/zero: a device"),
        (["--variant=nadamw", "--sedes=3"], "sedes"),
        (["--variant=nadamw", "3"], "unexpected argument '3'"),
    ],
)
def test_bad_words_are_named(tmp_path, arguments, named):
    (tmp_path / "kept").write_text("an earlier result")
    before = snapshot(tmp_path)
    assert_refused(run(*arguments, f"--out={tmp_path}"), named)
    assert snapshot(tmp_path) == before


def test_a_malformed_search_space_is_named(tmp_path):
    space = tmp_path / "space.json"
    [point] = json.loads((ROOT / "search_spaces" / "nadamw.json").read_text())
    space.write_text(json.dumps([point, {**point, "matmul_precison": "high"}]))
    for harness in ("embedded", "algoperf"):
        words = [f"--search_space={space}", f"--out={tmp_path}/out", f"--harness={harness}"]
        done = run("--variant=eshampoo_fixed", *words, "--dry_run")
        assert_refused(done, "point 1: precondition_frequency is missing")
    space.write_text(json.dumps([{**point, "warmup_facto": 0.1}]))
    done = run("--variant=nadamw", f"--search_space={space}", f"--out={tmp_path}/out")
    assert_refused(done, '"warmup_facto" is no field of this variant')
    assert "did you mean warmup_factor?" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["mini"].update(max_steps="many"), "many"),
        (lambda c: c["mini"].update(max_stps=3), "max_stps"),
        (lambda c: c["mini"].pop("max_steps"), "max_steps"),
    ],
)
def test_a_malformed_workload_file_is_named(tmp_path, change, named):
    for path in (ROOT / "workloads_config").glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    content = json.loads((tmp_path / "ogbg.json").read_text())
    change(content)
    (tmp_path / "ogbg.json").write_text(json.dumps(content))
    arguments = ["--variant=nadamw", "--workload=ogbg", f"--workloads_config={tmp_path}"]
    done = run(*arguments, f"--out={tmp_path}/out")
    assert_refused(done, named)
    assert "ogbg.json" in done.stderr and not (tmp_path / "out").exists()


def test_an_out_folder_that_holds_another_run_is_left_alone(tmp_path):
    run_dir = tmp_path / "nadamw" / "study_1" / "ogbg_mini_pytorch" / "trial_1"
    run_dir.mkdir(parents=True)
    record = {"identity": {"harness": "embedded", "variant": "other"}, "status": "finished"}
    (run_dir / "run.json").write_text(json.dumps(record))
    before = snapshot(tmp_path)
    done = run("--variant=nadamw", "--workload=all", f"--out={tmp_path}")
    assert_refused(done, 'holds another run: variant is "other" there and "nadamw" now')
    assert snapshot(tmp_path) == before


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path):
    done = run("--variant=nadamw", "--seeds=2", f"--out={tmp_path}/out", "--dry_run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" -> ") == 6 and "learning_rate=" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_table_of_one_version_has_its_runs_alone(tmp_path):
    runs = ROOT / "tests" / "data" / "published"
    done = run(f"--runs={runs}", "--version=2026", f"--out={tmp_path}/t", script="table.py")
    assert done.returncode == 0, done.stderr
    (table,) = json.loads((tmp_path / "t.json").read_text())
    assert table["size"] == "full"
    found = [row["version"] for row in table["rows"] if row["runs"]]
    assert found and set(found) == {"2026"}
    assert "note: VERSION=2026: " in done.stdout and "other runs are left out" in done.stdout
    wrong = run(f"--runs={runs}", "--version=2027", script="table.py")
    assert_refused(wrong, "VERSION=2027: there is v0.5, v0.6, 2026")


def test_the_table_script_refuses_a_missing_folder_and_writes_the_rest(tmp_path):
    refused = run("--runs=no/such/runs", f"--out={tmp_path}/table", script="table.py")
    assert_refused(refused, "no such folder of runs")
    runs = ROOT / "tests" / "data" / "published_v06"
    done = run(f"--runs={runs}", f"--out={tmp_path}/table", script="table.py")
    assert done.returncode == 0, done.stderr
    assert "no runs yet" in done.stdout and "AlgoPerf v0.6" in done.stdout
    endings = ("csv", "index.md", "json", "md", "tex")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"table.{e}" for e in endings]


def test_a_table_of_other_runs_is_written_only_where_asked(tmp_path):
    (tmp_path / "a,b").mkdir()
    before = {p: p.stat().st_mtime_ns for p in (ROOT / "results").glob("table1.*")}
    done = run(f"--runs={tmp_path}/a,b", script="table.py")
    assert done.returncode == 0, done.stderr
    assert "not written: results/table1.* is of the default runs" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in (ROOT / "results").glob("table1.*")} == before
    home = run("--runs=~/a,b", "--out=~/t", script="table.py", HOME=str(tmp_path))
    assert home.returncode == 0 and (tmp_path / "t.md").is_file(), home.stderr
    nobody = run("--runs=~no-such-user/x", script="table.py")
    assert_refused(nobody, "RUNS=~no-such-user/x: no home folder of that name here")


@pytest.mark.parametrize("text", ["x,", ",x", "x,,y", "", " ", ","])
def test_empty_names_in_a_list_of_folders_are_refused(tmp_path, text):
    with pytest.raises(UserError, match=f"^RUNS={text}: an empty name"):
        paths.listed("RUNS", text, tmp_path)
    (tmp_path / "a,").mkdir()
    assert paths.listed("RUNS", "a,", tmp_path) == [tmp_path / "a,"]
    assert paths.listed("RUNS", "x,y", tmp_path) == [tmp_path / "x", tmp_path / "y"]


@pytest.mark.parametrize("script", ["table.py", "rank.py"])
def test_scripts_refuse_empty_names_of_folders(script):
    word = "run" if script == "rank.py" else "runs"
    assert_refused(run(f"--{word}=results/measured,", script=script), "an empty name")


def test_an_error_of_the_system_is_one_line_with_its_path(tmp_path):
    runs = f"--runs={tmp_path}"
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "file").touch()
    for out, named in (
        (f"{tmp_path}/{'n' * 256}", f"{'n' * 256}.md: File name too long"),
        (f"{tmp_path}/file/t", f"{tmp_path}/file: "),
        (f"{tmp_path}/link/t", f"{tmp_path}/link: File exists: something else is there already"),
    ):
        done = run(runs, f"--out={out}", script="table.py")
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ") and named in line, line


@pytest.mark.parametrize("name", ["/", "{}/new/", "{}/..", "{}/."])
def test_a_table_needs_a_name(tmp_path, name):
    text = name.format(tmp_path)
    done = run(f"--runs={tmp_path}", f"--out={text}", script="table.py")
    assert_refused(done, f"TABLE={text}: a folder; ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_table_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, call):
    stem = tmp_path / "table1"
    table_files.write_files(stem, {"md": "old", "csv": "old"})
    calls, real = [], getattr(os, call)

    def full(*arguments, **more):
        calls.append(arguments)
        if len(calls) == (1 if call == "replace" else 2):  # of the second file, or the first name
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(disk.DiskError, match=r"table1\.(md|csv): No space left on device"):
            table_files.write_files(stem, {"md": "new", "csv": "new"})
    assert snapshot(tmp_path) == {Path(f"{stem}.{e}"): b"old" for e in ("csv", "md")}
    table_files.write_files(stem, {"md": "new", "csv": "new"})
    assert set(snapshot(tmp_path).values()) == {b"new"}
