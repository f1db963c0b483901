"""Studies: the paper's rows as runs, their state from the folders alone, several at once."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import run_lock, seal
from algoperf_shampoo.harness.spec import RunSpec
from algoperf_shampoo.study import local, progress, status, study
from algoperf_shampoo.study.study import Options

ROOT = Path(__file__).resolve().parents[2]
# A stand-in for scripts/submit.py: it takes the same flags and writes a run's folder.
SUBMIT = ROOT / "tests" / "study" / "fake_submit.py"


def paper(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "results" / "paper" / f"{name}.json").read_text())["rows"]


@pytest.mark.parametrize(("name", "runs"), [("table1", 33), ("table3", 106)])
def test_the_papers_rows_seeds_and_gpus(name: str, runs: int) -> None:
    made = study.lay_out(ROOT, name, Options(size="full", data_dir="/not/mounted/here"))
    rows = paper(name)
    assert (made.rows, len(made.jobs), made.absent) == (len(rows), runs, ())
    for number, row in enumerate(rows, start=1):
        own = [job for job in made.jobs if number in job.rows]
        # A cell of OGBG's F = 1 is empty in the paper: its runs died.
        assert len(own) == (row["runs"] or 5)
        for job in own:
            assert job.run.workload == row["workload"] and job.run.variant == row["variant"]
            assert job.run.hparams["precondition_frequency"] == row["precondition_frequency"]
            assert job.run.hparams.get("tau") == row["tau"]
            assert job.gpus == (4 if row["workload"] == "imagenet_vit" else 1)


def test_a_row_at_the_variants_own_point_is_plain_submit() -> None:
    made = study.lay_out(ROOT, "table1", Options(size="full", data_dir="/data"))
    assert {job.run.label for job in made.jobs} == {job.run.variant for job in made.jobs}
    assert made.jobs[0].command == (
        "make submit-shampoo-grafting WORKLOAD=fastmri SIZE=full HARNESS=algoperf GPUS=1 "
        "DATA_DIR=/data SEEDS=1,"
    )


def test_a_version_reaches_every_run() -> None:
    made = study.lay_out(ROOT, "table1", Options(size="full", version="2026"))
    assert {job.run.label for job in made.jobs} == {f"{j.run.variant}_2026" for j in made.jobs}
    assert all("--version=2026" in job.flags for job in made.jobs)
    assert "HARNESS=algoperf VERSION=2026 " in made.jobs[0].command
    with pytest.raises(UserError, match="VERSION=2026: minis have"):
        study.lay_out(ROOT, "table1", Options(version="2026"))


def test_a_study_of_self_tuning_entries() -> None:
    options = Options(size="full", version="2026", ruleset="self")
    made = study.lay_out(ROOT, "table3", options)
    assert len(made.jobs) == 106 and len({job.run.run_dir for job in made.jobs}) == 106
    for job in made.jobs:
        assert job.run.ruleset == "self" and job.run.label.endswith("_2026_self")
        assert {"--ruleset=self", "--version=2026"} <= set(job.flags)
    rows = {row["precondition_frequency"] for row in paper("table3")}
    assert {job.run.hparams["precondition_frequency"] for job in made.jobs} == rows
    assert "RULESET" not in study.lay_out(ROOT, "table1", Options(size="full")).jobs[0].command


def write(path: Path, **changes: Any) -> str:
    content = {
        "title": "A study",
        "mini": {"seeds": 2, "F": {"100": 10, "50": 10, "1": None}},
        "rows": [
            {"workload": "ogbg", "variant": "eshampoo_fixed", "F": 100},
            {"workload": "ogbg", "variant": "eshampoo_fixed", "F": 50},
            {"workload": "ogbg", "variant": "eshampoo_fixed", "F": 1},
            {"workload": "fastmri", "variant": "nadamw", "set": {"learning_rate": 0.5}},
        ],
    }
    path.write_text(json.dumps({**content, **changes}))
    return str(path)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    made = study.lay_out(ROOT, write(tmp_path / "mine.json"), Options())
    assert [job.rows for job in made.jobs] == [(1, 2), (1, 2), (4,), (4,)]
    assert made.absent == ("row 3: ogbg eshampoo_fixed (F = 1): no counterpart at SIZE=mini",)
    assert dict(made.jobs[2].words)["SET"] == "learning_rate=0.5"
    assert made.jobs[2].run.hparams["learning_rate"] == 0.5
    one = study.lay_out(ROOT, str(tmp_path / "mine.json"), Options(workload="ogbg", seeds="7,"))
    assert [job.run.seed for job in one.jobs] == [7]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": []}, "at least one row"),
        ({"rows": [{"workload": "mnist", "variant": "nadamw"}]}, "row 1: workload 'mnist'"),
        ({"rows": [{"workload": "ogbg"}]}, "row 1: no variant"),
        ({"rows": [{"workload": "ogbg", "variant": "adam"}]}, "VARIANT=adam"),
        ({"rows": [{"workload": "ogbg", "variant": "nadamw", "G": 1}]}, "unknown key 'G'"),
        ({"rows": [{"workload": "ogbg", "variant": "nadamw", "F": 100}]}, "row 1: .* no precond"),
        ({"rows": [{"workload": "ogbg", "variant": "eshampoo_fixed", "F": 7}]}, "F = 7 has no"),
        ({"mini": {"F": 3}}, "mini.F: an object"),
        ({"mini": None}, "no size mini"),
        ({"mini": {"seeds": 0}}, "SEEDS=0"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        study.lay_out(ROOT, write(tmp_path / "mine.json", **changes), Options())
    assert "\n" not in str(caught.value)


def test_a_workload_without_rows_names_those_with(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="WORKLOAD=x: no run; its rows are of ogbg, fastmri$"):
        study.lay_out(ROOT, write(tmp_path / "mine.json"), Options(workload="x"))


def test_unknown_study() -> None:
    with pytest.raises(UserError, match="STUDY=table2: there is claims, family, mini, table1"):
        study.lay_out(ROOT, "table2", Options())


# State from the folders.


def folder_of(tmp_path: Path, values: list[float], **files: Any) -> Path:
    """A run's folder with evaluations every 10 of 40 steps, one second a step."""
    path = tmp_path / "nadamw" / "study_1" / "ogbg_mini_pytorch" / "trial_1"
    path.mkdir(parents=True)
    rows = [
        {
            "global_step": 10 * i,
            "accumulated_submission_time": 10.0 * i,
            "total_duration": 20.0 * i,
            "validation/accuracy": value,
        }
        for i, value in enumerate(values, start=1)
    ]
    if rows:
        with (path / "eval_measurements.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    meta = {"workload.target_metric_name": "accuracy", "workload.validation_target_value": 0.5}
    contents = {
        "meta_data_0.json": {**meta, "workload.max_allowed_runtime_sec": 1000},
        "flags_0.json": {"max_global_steps": 40},
        "hparams.json": {},
        **{name.replace("__", "."): value for name, value in files.items()},
    }
    for name, content in contents.items():
        (path / name).write_text(json.dumps(content))
    return path


def launches(how: str | None) -> list[dict[str, Any]]:
    return [{"how": "finished"}, {"how": how, "exit_code": None}]


@pytest.mark.parametrize(
    ("files", "state", "note"),
    [
        ({"run__json": {"status": "finished"}}, progress.DAMAGED, "identity is null"),
        ({"run__json": {"status": "finished"}, "flags_0__json": [1]}, "damaged", "holds a list"),
        ({"launches__json": {"how": "finished"}}, progress.MISSING, ""),
        ({"launches__json": [{"how": 5}]}, progress.DAMAGED, "how is 5"),
        ({"run__json": {"status": "running"}}, progress.STOPPED, "killed or stopped"),
        ({"launches__json": launches("finished")}, progress.DONE, ""),
        ({"launches__json": launches("finished (launcher killed)")}, progress.DONE, ""),
        ({"launches__json": launches(None)}, progress.STOPPED, "launcher killed"),
        ({"launches__json": launches("stopped by SIGTERM")}, progress.STOPPED, "stopped by"),
        ({"launches__json": launches("worker of rank 1 killed by SIGKILL")}, "failed", "rank 1"),
        ({"launches__json": [{"exit_code": 0}]}, progress.DONE, ""),
        ({"launches__json": [{"exit_code": 1}]}, progress.FAILED, "exit code 1"),
    ],
)
def test_state_of_a_folder(tmp_path: Path, files: dict[str, Any], state: str, note: str) -> None:
    path = folder_of(tmp_path, [0.1, 0.2], **files)
    now = progress.of(path)
    assert now.state == state and note in now.note
    with run_lock.hold(path):
        held = progress.of(path).state
    finished = files.get("run__json") == {"status": "finished"}
    assert held == (progress.DAMAGED if finished else progress.RUNNING)


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("flags_0.json", '{"max_global_steps": "abc"}', 'flags_0.json: max_global_steps is "abc"'),
        (
            "meta_data_0.json",
            '{"workload.max_allowed_runtime_sec": "abc"}',
            "workload.max_allowed_runtime_sec is",
        ),
        (".failure.json", "[" * 100_000, ".failure.json is nested deeper"),
        ("flags_1.json", None, "flags_1.json there is no such file"),
        ("run.json", "pipe", "run.json is no regular file"),
        ("launches.json", "pipe", "launches.json is no regular file"),
    ],
)
def test_one_odd_file_is_its_own_runs_trouble(
    tmp_path: Path, name: str, content: str | None, note: str
) -> None:
    folder_of(tmp_path / "whole", [0.1, 0.2], launches__json=launches("finished"))
    odd = folder_of(tmp_path / "odd", [0.1, 0.2], launches__json=launches("finished")) / name
    odd.unlink(missing_ok=True)
    if content == "pipe":
        os.mkfifo(odd)
    elif content is None:
        odd.symlink_to("nowhere")
    else:
        odd.write_text(content)
    shown = subprocess.run(
        [sys.executable, "scripts/status.py", f"--out={tmp_path}", "--once"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "400"},
    )
    rows = [line for line in shown.stdout.splitlines() if "seed 1" in line]
    assert (shown.returncode, len(rows), shown.stderr) == (0, 2, "")
    now = progress.of(odd.parent)
    assert note in now.note and "\n" not in now.note
    assert sum("done" in row for row in rows) >= 1


def fake_run(tmp_path: Path) -> tuple[study.Study, Path]:
    made = small(tmp_path)
    assert local.run(made, made.jobs[:1], 1, lambda line: None, program("well")) == 0
    return made, made.jobs[0].run.run_dir


@pytest.mark.parametrize(
    ("part", "key", "value", "words"),
    [
        ("hparams", "learning_rate", 0.5, "hparams.learning_rate is 0.5 there"),
        ("workload_properties", "max_steps", 5, "max_steps is 5 there"),
        (None, "seed", 9, "seed is 9 there"),
        (None, "variant", "x", 'variant is "x" there'),
        (None, "stop_at_target", False, "stop_at_target is false there"),
    ],
)
def test_another_run_in_the_folder_is_not_done(
    tmp_path: Path, part: str | None, key: str, value: Any, words: str
) -> None:
    made, folder = fake_run(tmp_path)
    assert progress.of(folder, made.jobs[0].run).state == progress.DONE
    record = json.loads((folder / "run.json").read_text())
    identity = record["identity"]
    (identity[part] if part else identity)[key] = value
    (folder / "hparams.json").write_text(json.dumps(identity["hparams"]))
    record[seal.FILES] = seal.make(folder)
    (folder / "run.json").write_text(json.dumps(seal.signed(record)))
    run = made.jobs[0].run
    ((_, now),) = found = status.look([run])
    assert (now.state, now.over, now.hit_step) == (progress.OTHER, True, None)
    assert f"holds another run: {words}" in now.note
    assert "0 hits" in status.render("", found) and len(status.unlaunchable(found)) == 1


def test_a_damaged_run_is_not_done_and_its_hit_not_counted(tmp_path: Path) -> None:
    made, folder = fake_run(tmp_path)
    assert progress.of(folder).hit_step == 1
    path = folder / "eval_measurements.csv"
    path.write_text(path.read_text().replace("0.6", "0.7"))
    ((_, now),) = found = status.look([made.jobs[0].run])
    assert (now.state, now.hit_step, now.over) == (progress.DAMAGED, None, True)
    assert now.note.startswith("eval_measurements.csv: has been changed")
    text = status.render("A study", found, width=300)
    assert "1 damaged; 0 hits" in text and "(eval_measurements.csv: has been changed" in text
    lines: list[str] = []
    assert local.run(made, made.jobs[:1], 1, lines.append, program("well")) == 1
    assert "damaged: eval_measurements.csv" in lines[0] and len(events(made)) == 2


def test_progress_hits_and_time_left(tmp_path: Path) -> None:
    path = folder_of(tmp_path, [0.1, 0.6, 0.4], run__json={"status": "running"})
    with run_lock.hold(path):
        now = progress.of(path)
    assert (now.step, now.value, now.target) == (30, 0.4, 0.5)
    assert (now.hit_step, now.hit_seconds) == (20, 20.0)
    assert now.fraction == 0.75 and now.seconds_left == pytest.approx(20.0)
    line = progress.hit_line("a run", now)
    assert line == "a run: hit: accuracy 0.5 reached at step 20, 20.0 s of submission time"
    assert progress.of(tmp_path / "none").state == progress.MISSING


def test_why_an_embedded_run_failed_is_kept_until_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "nadamw" / "study_1" / "ogbg_mini_pytorch" / "trial_1"
    with pytest.raises(ValueError), progress.noting_failure(path):
        raise ValueError("no\nsense")
    assert progress.of(path) == progress.Progress(progress.FAILED, note="ValueError: no sense")
    with progress.noting_failure(path):
        pass
    assert progress.of(path).state == progress.MISSING


def test_the_table(tmp_path: Path) -> None:
    path = folder_of(tmp_path, [0.1, 0.6], run__json={"status": "running"})
    run = RunSpec("nadamw", "nadamw", "ogbg_mini", 1, 1, {}, path)
    waiting = RunSpec("nadamw", "nadamw", "ogbg_mini", 2, 1, {}, tmp_path / "other")
    with run_lock.hold(path):
        queue = {path: "Slurm 7_0", waiting.run_dir: "Slurm 7_1 pending"}
        found = status.look([run, waiting], queue)
    text = status.render("A study", found, width=200)
    assert "2 runs: 1 queued, 1 running; 1 hits; those running end in at most 40 s" in text
    assert "running  [######......]  50%  step 20  accuracy 0.6000 of 0.5000  hit" in text
    assert text.splitlines()[-1].endswith("queued   (Slurm 7_1 pending)")
    short = status.render("A study", found, height=6)
    assert short.splitlines()[-1] == "... and 1 more" and "running" in short
    whole = text.splitlines()[3]
    narrow = status.render("A study", found, width=len(whole) - 1).splitlines()[3]
    assert narrow == whole.replace("accuracy ", "")


# Launching.


def small(tmp_path: Path) -> study.Study:
    rows = [{"workload": "ogbg", "variant": "nadamw"}]
    name = write(tmp_path / "small.json", mini={"seeds": 3}, rows=rows)
    return study.lay_out(ROOT, name, Options(out=str(tmp_path / "out")))


def program(mode: str) -> list[str]:
    return [sys.executable, str(SUBMIT), mode]


def events(made: study.Study) -> list[str]:
    return (made.out / "events").read_text().split("\n")[:-1]


def test_several_at_once_and_none_twice(tmp_path: Path) -> None:
    made, lines = small(tmp_path), []
    assert local.run(made, made.jobs, 2, lines.append, program("well")) == 0
    assert [now.state for _, now in status.look([job.run for job in made.jobs])] == ["done"] * 3
    order = [event.split()[0] for event in events(made)]
    assert max(order[: i + 1].count("start") - order[: i + 1].count("end") for i in range(6)) == 2
    assert sum(": hit: " in line for line in lines) == 3
    assert local.run(made, made.jobs, 2, lines.append, program("well")) == 0
    assert len(events(made)) == 6  # a second time nothing is started


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path) -> None:
    made, lines = small(tmp_path), []
    assert local.run(made, made.jobs, 1, lines.append, program("second_fails")) == 1
    states = [now.state for _, now in status.look([job.run for job in made.jobs])]
    assert states == ["done", "missing", "done"]
    (said,) = [line for line in lines if "exit code 3" in line]
    assert "seed 2" in said and "out of luck" in said
    assert str(local.log_path(made, made.jobs[1])) in said


def test_the_reason_is_the_error_of_this_launch_and_no_hint(tmp_path: Path) -> None:
    made, lines = small(tmp_path), []
    log = local.log_path(made, made.jobs[1])
    log.parent.mkdir(parents=True)
    log.write_text("error: of yesterday\n")
    assert local.run(made, made.jobs[1:2], 1, lines.append, program("second_fails")) == 1
    assert lines[-1].endswith(f"exit code 3: out of luck; see {log}")


def test_a_run_that_another_launch_has_or_ended_is_not_failed(tmp_path: Path) -> None:
    made, lines = small(tmp_path), []
    folder = made.jobs[1].run.run_dir
    with run_lock.hold(folder):
        refused = [sys.executable, "-c", "raise SystemExit('error: held')"]
        assert local.run(made, made.jobs[1:2], 1, lines.append, refused) == 0
    assert lines == [f"{made.jobs[1].run.name}: running by another launch"]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG")
def test_a_killed_study_takes_its_runs_along_and_goes_on(tmp_path: Path) -> None:
    made = small(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.study.test_study import *\n"
        "made = small(Path(sys.argv[1]))\n"
        "local.run(made, made.jobs, 2, print, program('forever'))\n"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    runs = [job.run for job in made.jobs]
    wait_until(lambda: [now.state for _, now in status.look(runs)].count("running") == 2)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_until(lambda: not any(run_lock.held(run.run_dir) for run in runs))
    assert local.run(made, made.jobs, 2, lambda line: None, program("well")) == 0
    assert [now.state for _, now in status.look(runs)] == ["done"] * 3


def wait_until(condition: Any) -> None:
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come true")


def test_more_gpus_than_there_are_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local.gpus, "here", lambda: [])
    made = study.lay_out(ROOT, "table1", Options(size="full", out=str(tmp_path)))
    with pytest.raises(UserError, match="needs 4 GPUs, this machine has 0"):
        local.run(made, made.jobs, None, pytest.fail)
