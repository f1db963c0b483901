"""Disks, folders, clocks, losses and files that go wrong: what a run says; nothing is lost."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import checkpoint, run_folder, seal
from algoperf_shampoo.optim.nonfinite import NonFiniteGradientError
from algoperf_shampoo.study import launch, logs, plan
from algoperf_shampoo.study.claims.statistics import of_run
from tests.faults.disks import Failing, NoSync, standing_in
from tests.harness import fakes
from tests.harness.test_runner import curve, interrupted, rows

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk():
    with standing_in(NoSync()):
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = fakes.spec_in(tmp_path_factory.mktemp("unbroken"))
    with standing_in(NoSync()):
        fakes.execute(run)
    return curve(run.run_dir)


def with_signature(function):
    function.__signature__ = __import__("inspect").signature(fakes._update_params)
    return function


def at_step(step, act):
    """An ``update_params`` that calls ``act`` before one step."""

    def update_params(**given):
        if given["global_step"] == step:
            act()
        return fakes._update_params(**given)

    return with_signature(update_params)


# Lost and changed files.


@pytest.mark.parametrize("name", ["eval_measurements.csv", "measurements.csv", "step_losses.csv"])
@pytest.mark.parametrize("damage", ["last row", "cut", "changed", "gone", "empty", "no text"])
def test_a_resume_puts_back_what_a_csv_has_lost(tmp_path, unbroken, name, damage):
    run = interrupted(tmp_path, step=25)
    path = run.run_dir / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {
                "last row": data[: data.rstrip().rindex(b"\n") + 1],
                "cut": data[:-7],
                "changed": data.replace(b"1", b"2"),
                "empty": b"",
                "no text": b"\xff\0" * 100,
            }[damage]
        )
    lines = []
    fakes.execute(run, echo=lines.append)
    assert curve(run.run_dir) == unbroken
    assert any(line.startswith(f"{run.name}: {name}: ") and "put back" in line for line in lines)
    record = run_folder.read_record(run.run_dir)
    assert seal.problems(run.run_dir, record, ended=True) == []


@pytest.mark.parametrize("name", ["meta_data_0.json", "flags_0.json", "run.json"])
def test_a_resume_refuses_what_it_cannot_make_again(tmp_path, name):
    run = interrupted(tmp_path, step=25)
    path = run.run_dir / name
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    before = {p.name: p.read_bytes() for p in run.run_dir.iterdir() if p.name != ".lock"}
    with pytest.raises(
        UserError, match="changed since it was written.*put back a copy|another run"
    ):
        fakes.execute(run)
    assert before == {p.name: p.read_bytes() for p in run.run_dir.iterdir() if p.name != ".lock"}


def test_a_finished_run_that_was_damaged_is_said_so(tmp_path):
    run = fakes.spec_in(tmp_path)
    fakes.execute(run)
    path = run.run_dir / "eval_measurements.csv"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="damaged since: eval_measurements.csv: .* 4 of 5 rows"):
        fakes.execute(run)


def test_a_csv_that_someone_else_changes_in_mid_run_is_put_back(tmp_path, unbroken):
    run = fakes.spec_in(tmp_path)
    path = run.run_dir / "eval_measurements.csv"
    lines = []
    meddle = at_step(15, lambda: path.write_text("oops\n"))
    fakes.execute(run, echo=lines.append, update_params=meddle)
    assert curve(run.run_dir) == unbroken
    assert any("eval_measurements.csv: was changed by someone else: put back" in x for x in lines)


def test_without_checkpoints_a_run_starts_over_and_its_time_stays_spent(tmp_path, unbroken):
    run = interrupted(tmp_path, step=25)
    for path in run.run_dir.glob("checkpoint_*"):
        path.unlink()
    before = float(rows(run.run_dir / "eval_measurements.csv")[-1]["accumulated_submission_time"])
    lines = []
    fakes.execute(run, echo=lines.append)
    assert "no checkpoint is left of 20 steps: starting over; the" in lines[0]
    assert curve(run.run_dir) == unbroken
    found = rows(run.run_dir / "eval_measurements.csv")
    assert float(found[0]["accumulated_submission_time"]) > before
    assert float(found[0]["total_duration"]) > before
    assert [row["preemption_count"] for row in found] == ["1"] * 5
    assert len(rows(run.run_dir / "set_aside_1_eval_measurements.csv")) == 3


def test_orphan_digests_are_cleaned_up(tmp_path):
    run = interrupted(tmp_path, step=25)
    (run.run_dir / "checkpoint_7.sha256").write_text("0" * 64)
    fakes.execute(run)
    assert sorted(p.name for p in run.run_dir.glob("checkpoint_*")) == [
        "checkpoint_40",
        "checkpoint_40.sha256",
    ]


class Odd:
    """An entry of optimizer_state whose state torch's safe loader refuses."""

    def state_dict(self):
        return {"odd": Odd}

    def load_state_dict(self, state):
        pass


def test_state_that_torch_would_refuse_to_load_is_said_at_the_first_checkpoint(tmp_path):
    def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
        state = fakes._init_optimizer_state(
            workload, model_params, model_state, hyperparameters, rng
        )
        return {**state, "odd": Odd()}

    with pytest.raises(UserError, match="checkpoint_1: it holds something of type .*Odd") as caught:
        fakes.execute(fakes.spec_in(tmp_path), init_optimizer_state=init_optimizer_state)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_that_torch_refuses_is_one_line_and_the_one_before_is_taken(
    tmp_path, unbroken
):
    run = interrupted(tmp_path, step=25)
    saved = checkpoint.load_newest(run.run_dir)[0]
    assert saved["global_step"] == 20
    checkpoint.save(run.run_dir, 20, {**saved, "odd": Odd})
    lines = []
    fakes.execute(run, echo=lines.append)
    assert "checkpoint_20 cannot be read: it holds something of type " in lines[0]
    assert "weights_only" not in lines[0] and "\n" not in lines[0]
    assert curve(run.run_dir) == unbroken


# Disks.


def failing_everywhere(tmp_path, code):
    """Runs into a disk that fails at the n-th write, for n = 0, 1, ...; (n, message, folder)."""
    for at in range(10_000):
        run = fakes.spec_in(tmp_path / f"at_{at}")
        stand_in = Failing(at, code)
        try:
            with standing_in(stand_in):
                fakes.execute(run)
        except UserError as error:
            yield at, str(error), run
        if stand_in.failed is None:
            return
        shutil.rmtree(tmp_path / f"at_{at}", ignore_errors=True)


@pytest.mark.faults
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_at_any_write_is_one_line_and_nothing_is_lost(tmp_path, unbroken, code):
    count = 0
    for at, message, run in failing_everywhere(tmp_path, code):
        count += 1
        assert os.strerror(code) in message and str(tmp_path) in message, (at, message)
        assert "\n" not in message
        saved = checkpoint.load_newest(run.run_dir)[0] if run.run_dir.is_dir() else None
        record = run.run_dir / "run.json"
        finished = record.is_file() and json.loads(record.read_text())["status"] == "finished"
        lines = []
        fakes.execute(run, echo=lines.append)
        assert curve(run.run_dir) == unbroken, at
        if finished:  # what could not be written then comes after the run's own files
            assert saved["global_step"] == 40 and "finished before" in lines[0], at
        elif saved is not None:
            assert f"continuing from step {saved['global_step']}" in lines[0], at
    assert count > 100


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tmp_path, unbroken):
    run = fakes.spec_in(tmp_path)
    with standing_in(Failing(120)), pytest.raises(UserError, match="No space left on device") as e:
        fakes.execute(run)
    assert str(run.run_dir) in str(e.value) and "make room" in str(e.value)
    assert not list(run.run_dir.glob(".*.tmp"))
    fakes.execute(run)
    assert curve(run.run_dir) == unbroken


@pytest.mark.parametrize("anew", [False, True])
def test_a_folder_deleted_in_mid_run_ends_it(tmp_path, anew):
    run = fakes.spec_in(tmp_path)

    def delete():
        shutil.rmtree(run.run_dir)
        if anew:
            run.run_dir.mkdir()

    with pytest.raises(UserError, match="not the folder that the run began in: it is gone"):
        fakes.execute(run, update_params=at_step(15, delete))
    assert not anew or list(run.run_dir.iterdir()) == []
    fakes.execute(run)
    assert rows(run.run_dir / "eval_measurements.csv")[-1]["global_step"] == "40"


def file(path):
    path.write_text("")


def nowhere(path):
    path.symlink_to(path.parent / "nowhere")


def circle(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("name", "make", "why"),
    [
        ("x" * 256, None, "too long"),
        ("out", file, "Not a directory|a file"),
        ("out", nowhere, "a symbolic link to .*nowhere, which is not there"),
        ("out", circle, "symbolic link"),
        ("../../../proc/out", None, "No such file|not permitted|denied|gone"),
    ],
)
def test_a_folder_that_cannot_be_is_one_line(tmp_path, name, make, why):
    out = tmp_path / name
    if name.startswith(".."):
        out = type(tmp_path)("/proc/out")
    if make is not None:
        make(out)
    with pytest.raises(UserError, match=why) as caught:
        fakes.execute(fakes.spec_in(out))
    assert "\n" not in str(caught.value) and str(out) in str(caught.value)


def test_a_lock_that_is_a_folder_is_one_line(tmp_path):
    run = fakes.spec_in(tmp_path)
    (run.run_dir / ".lock").mkdir(parents=True)
    with pytest.raises(UserError, match=r"\.lock: Is a directory"):
        fakes.execute(run)


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_trained(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda *a, **k: False)  # root may write anywhere
    with pytest.raises(UserError, match="Permission denied|Read-only"):
        run_folder.check(fakes.spec_in(tmp_path).run_dir, {})
    monkeypatch.undo()
    run = fakes.spec_in(tmp_path)
    fakes.execute(run)
    monkeypatch.setattr(os, "access", lambda *a, **k: False)
    fakes.execute(run)  # a finished run is only reported


def test_a_run_that_fails_is_one_error_line_and_the_next_one_starts(tmp_path, monkeypatch):
    root = fakes_root(tmp_path)
    runs = tuple(fakes.spec_in(tmp_path, seed) for seed in (1, 2))
    (runs[0].run_dir / ".lock").mkdir(parents=True)
    monkeypatch.setattr(run_folder, "check_names", lambda run_dir: None)  # it comes later
    lines = []
    failed = launch.launch(
        plan.Plan(root, "embedded", "mini", tmp_path, runs, {}),
        load_workload=lambda name: fakes.FakeWorkload(),
        echo=lines.append,
    )
    assert failed == 1 and lines[-1] == "1 of 2 runs failed"
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and ".lock: Is a directory" in errors[0] and "\n" not in errors[0]
    assert run_folder.read_record(runs[1].run_dir)["status"] == "finished"


def fakes_root(tmp_path):
    """A root with the stand-in submission in it."""
    folder = tmp_path / "root" / "submissions" / "fake"
    folder.mkdir(parents=True)
    (folder / "submission.py").write_text(
        "from tests.harness.fakes import _init_optimizer_state as init_optimizer_state\n"
        "from tests.harness.fakes import _update_params as update_params\n"
        "from tests.harness.fakes import _data_selection as data_selection\n"
        "def get_batch_size(workload_name):\n    return 16\n"
    )
    return tmp_path / "root"


# Clocks.


def test_a_time_of_day_that_jumps_changes_nothing(tmp_path, monkeypatch):
    real, offset = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])

    def jump():
        offset[0] += -3600.0 if offset[0] >= 0 else 7200.0

    def update_params(**given):
        if given["global_step"] in (5, 15, 25):
            jump()
        return fakes._update_params(**given)

    run = fakes.spec_in(tmp_path)
    workload = fakes.FakeWorkload(max_allowed_runtime_sec=3000.0)
    result = fakes.execute(run, workload, update_params=with_signature(update_params))["result"]
    assert result["stop_reason"] == "step budget spent"
    spent = [
        float(r["accumulated_submission_time"]) for r in rows(run.run_dir / "eval_measurements.csv")
    ]
    assert spent == sorted(spent) and spent[0] > 0 and spent[-1] < 3000


# Losses that are no numbers.


class Diverging(fakes.FakeWorkload):
    """From step ``_first`` to ``_last`` the weights are NaN."""

    def model_fn(self, params, batch, model_state, mode, *rest):
        logits, state = super().model_fn(params, batch, model_state, mode, *rest)
        if mode == "TRAIN":
            self._calls = getattr(self, "_calls", 0) + 1
            if self._first <= self._calls <= self._last:
                logits = logits * math.nan
        return logits, state


def test_a_run_that_diverges_is_said_so_at_the_next_evaluation_and_ends(tmp_path):
    run, lines = fakes.spec_in(tmp_path), []
    record = fakes.execute(run, Diverging(_first=13, _last=99), echo=lines.append)
    assert record["status"] == "diverged" and record["result"]["diverged_at_step"] == 13
    assert record["result"]["stop_reason"] == "diverged" and record["result"]["global_step"] == 20
    said = [
        line for line in lines if "diverged at step 13: training loss is nan at step 20" in line
    ]
    assert len(said) == 1 and "a miss" in said[0]
    assert [row["global_step"] for row in rows(run.run_dir / "eval_measurements.csv")] == [
        "1", "10", "20",
    ]  # fmt: skip
    again = []
    assert fakes.execute(run, Diverging(_first=13, _last=99), echo=again.append) == record
    assert again == [f"{run.name}: finished before: {again[0].split('finished before: ')[1]}"]
    assert "diverged at step 13" in again[0]
    trial = logs.read_trial(run.run_dir)
    assert trial.outcome == "miss"


def test_a_setting_keeps_a_run_that_diverged_going(tmp_path):
    run, other = fakes.spec_in(tmp_path / "a"), fakes.spec_in(tmp_path / "b")

    def go(spec, keep):
        return fakes.runner.execute(
            spec, Diverging(_first=13, _last=99), fakes.make_submission(),
            root=fakes.Path(fakes.__file__).parents[2], echo=lines.append, keep_diverged=keep,
        )  # fmt: skip

    lines: list[str] = []
    record = go(run, True)
    assert (record["status"], record["result"]["global_step"]) == ("diverged", 40)
    assert record["result"]["stop_reason"] == "step budget spent"
    assert sum("diverged at step 13" in line for line in lines) == 2  # when seen, and at the end
    go(other, False)
    record = go(other, True)  # one that had ended for it goes on
    assert record["result"]["global_step"] == 40 and record["result"]["preemption_count"] == 1


def test_single_losses_that_are_no_numbers_are_said_and_no_more(tmp_path):
    class Skipping(torch.optim.Adam):
        def step(self, closure=None):
            for group in self.param_groups:
                if any(not p.grad.isfinite().all() for p in group["params"]):
                    return None
            return super().step(closure)

    def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
        optimizer = Skipping(model_params.parameters(), lr=hyperparameters.learning_rate)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
        return {"optimizer": optimizer, "scheduler": scheduler}

    run, lines = fakes.spec_in(tmp_path), []
    record = fakes.execute(
        run, Diverging(_first=13, _last=14), echo=lines.append,
        init_optimizer_state=init_optimizer_state,
    )  # fmt: skip
    assert record["status"] == "finished" and record["result"]["global_step"] == 40
    assert [x for x in lines if "not finite" in x] == [
        f"{run.name}: the training loss was not finite at 2 steps (first: 13) and is again"
    ]


def test_a_record_of_a_run_that_diverged_is_json(tmp_path):
    run = fakes.spec_in(tmp_path)
    fakes.execute(run, Diverging(_first=1, _last=99))
    text = (run.run_dir / "run.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
    with open(run.run_dir / "step_losses.csv", newline="") as opened:
        assert next(csv.DictReader(opened))["loss"] == "nan"


def test_an_optimizer_does_not_import_torchs_compiler():
    code = (
        "import sys, torch\n"
        "from algoperf_shampoo.harness import compiler\n"
        "with compiler.left_out(), torch.device('cpu'):\n"
        "    optimizer = torch.optim.Optimizer([torch.ones(2)], {'lr': 1.0})\n"
        "    optimizer.zero_grad(); optimizer.load_state_dict(optimizer.state_dict())\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "import torch._dynamo\n"
        "optimizer.zero_grad()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", ["update_params", "prepare_for_eval"])
@pytest.mark.parametrize("all_steps", [False, True])
def test_a_run_whose_optimizer_gives_up_has_diverged(tmp_path, where, all_steps):
    """Gradients that are not finite too often in a row, while the losses that are read are."""

    def unreachable():
        return fakes.FakeWorkload(validation_target_value=1.5)

    def update_params(**given):
        found = fakes._update_params(**given)
        if where == "update_params" and given["global_step"] == 19:
            raise NonFiniteGradientError("parameter 0 7 (of 9 in all)")
        return found

    def prepare_for_eval(**given):
        if where == "prepare_for_eval" and given["global_step"] == 20:
            raise NonFiniteGradientError("parameter 0 7 (of 9 in all)")
        return fakes._prepare_for_eval(**given)

    run, lines = replace(fakes.spec_in(tmp_path), stop_at_target=not all_steps), []
    hooks = {"update_params": with_signature(update_params), "prepare_for_eval": prepare_for_eval}
    record = fakes.execute(run, unreachable(), echo=lines.append, **hooks)
    assert record["status"] == "diverged" and record["result"]["stop_reason"] == "diverged"
    assert record["result"]["global_step"] == record["result"]["diverged_at_step"] == 20
    said = f"{run.name}: diverged at step 20: parameter 0 7 (of 9 in all)"
    assert lines.count(said) == 1
    trial = logs.read_trial(run.run_dir)
    assert trial.diverged and trial.outcome == (logs.ALL_STEPS if all_steps else "miss")
    assert of_run(trial, "loss", 40) == math.inf
    again = fakes.execute(run, unreachable(), echo=lines.append, **hooks)
    assert again == record
