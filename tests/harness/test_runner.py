"""The training loop: the curve, the clock, the files, resuming, and whose folder it is."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from algoperf_shampoo.contract import TrainingCompleteError
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import checkpoint, run_folder, runner
from tests.harness import fakes

ROOT = Path(__file__).parents[2]
TIMES = ("_time", "score", "total_duration", "preemption_count")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def curve(run_dir: Path) -> tuple:
    """What two equal runs share: every loss, the evaluation rows without times, the final hash."""
    evals = [
        {key: value for key, value in row.items() if not key.endswith(TIMES)}
        for row in rows(run_dir / "eval_measurements.csv")
    ]
    result = json.loads((run_dir / "run.json").read_text())["result"]
    return (run_dir / "step_losses.csv").read_text(), evals, result["params_sha256"]


def test_a_run_writes_algoperfs_files_and_every_loss(tmp_path):
    run = fakes.spec_in(tmp_path)
    result = fakes.execute(run)["result"]
    evals = rows(run.run_dir / "eval_measurements.csv")
    assert [row["global_step"] for row in evals] == ["1", "10", "20", "30", "40"]
    published = (
        "accumulated_eval_time accumulated_logging_time accumulated_submission_time global_step "
        "preemption_count score test/accuracy test/loss test/num_examples total_duration "
        "train/accuracy train/loss validation/accuracy validation/loss validation/num_examples"
    ).split()
    assert set(published) <= set(evals[0])
    assert list(evals[0]) == sorted(evals[0])
    assert [row["global_step"] for row in rows(run.run_dir / "step_losses.csv")] == [
        str(step) for step in range(1, 41)
    ]
    measurements = rows(run.run_dir / "measurements.csv")
    logged = [row["global_step"] for row in measurements if row["loss"]]
    assert logged == ["0", "7", "14", "21", "28", "35"]
    assert measurements[-1]["score"] and not measurements[-1]["train/loss"]
    assert result["stop_reason"] == "step budget spent" and result["global_step"] == 40
    assert json.loads((run.run_dir / "hparams.json").read_text()) == run.hparams
    meta = json.loads((run.run_dir / "meta_data_0.json").read_text())
    assert meta["rng_seed"] == 1 and meta["workload.validation_target_value"] == 0.9
    assert meta["packages"]["torch"] == torch.__version__
    assert json.loads((run.run_dir / "flags_0.json").read_text())["rng_seed"] == 1


def test_recorded_losses_are_the_losses(tmp_path):
    seen = []

    def update_params(**given):
        result = fakes._update_params(**given)
        return result

    class Spy(fakes.FakeWorkload):
        def loss_fn(self, label_batch, logits_batch, **rest):
            out = super().loss_fn(label_batch, logits_batch, **rest)
            if logits_batch.requires_grad:
                seen.append(out["summed"].item() / out["n_valid_examples"])
            return out

    run = fakes.spec_in(tmp_path)
    fakes.execute(run, Spy())
    losses = [float(row["loss"]) for row in rows(run.run_dir / "step_losses.csv")]
    assert losses == seen and losses[-1] < losses[0]


def test_same_seed_same_curve_and_other_seed_another(tmp_path):
    first, second = fakes.spec_in(tmp_path / "a"), fakes.spec_in(tmp_path / "b")
    zero, other = fakes.spec_in(tmp_path, seed=0), fakes.spec_in(tmp_path, seed=2)
    for run in (first, second, zero, other):
        fakes.execute(run)
    assert curve(first.run_dir) == curve(second.run_dir)
    assert len({curve(run.run_dir)[2] for run in (first, zero, other)}) == 3


@pytest.mark.parametrize(
    ("kill_at_step", "moment", "saved_step"),
    [(1, "evaluating", None), (30, "evaluating", 20), (30, "saving", 20), (30, "saved", 30)],
)
def test_sigkill_then_the_same_command_gives_the_unbroken_curve(
    tmp_path, kill_at_step, moment, saved_step
):
    unbroken, killed = fakes.spec_in(tmp_path / "a"), fakes.spec_in(tmp_path / "b")
    fakes.execute(unbroken)
    command = [sys.executable, "-m", "tests.harness.fakes", str(tmp_path / "b")]
    died = subprocess.run([*command, str(kill_at_step), moment], cwd=ROOT, capture_output=True)
    assert died.returncode == -9
    before = checkpoint.load_newest(killed.run_dir)[0]
    assert (before["global_step"] if before else None) == saved_step
    lines = []
    fakes.execute(killed, echo=lines.append)
    assert curve(killed.run_dir) == curve(unbroken.run_dir)
    evals = rows(killed.run_dir / "eval_measurements.csv")
    assert [row["global_step"] for row in evals] == ["1", "10", "20", "30", "40"]
    measured = [row["global_step"] for row in rows(killed.run_dir / "measurements.csv")]
    assert measured == [row["global_step"] for row in rows(unbroken.run_dir / "measurements.csv")]
    spent = [float(row["accumulated_submission_time"]) for row in evals]
    assert spent == sorted(spent)
    if before is not None:
        assert f"continuing from step {before['global_step']}" in lines[0]
        assert (
            spent[len(before["eval_results"])]
            > (before["train_state"]["accumulated_submission_time"])
        )
        assert evals[-1]["preemption_count"] == "1"
        assert (killed.run_dir / "meta_data_1.json").exists()
    assert len(run_folder.read_record(killed.run_dir)["sessions"]) == 2


def stop_at(step):
    """An ``update_params`` that dies at a step, as a killed run does, but within this process."""

    def update_params(
        workload, current_param_container, current_params_types, model_state, hyperparameters,
        batch, loss_type, optimizer_state, eval_results, global_step, rng,
    ):  # fmt: skip
        if global_step == step:
            raise KeyboardInterrupt
        return fakes._update_params(
            workload, current_param_container, current_params_types, model_state,
            hyperparameters, batch, loss_type, optimizer_state, eval_results, global_step, rng,
        )  # fmt: skip

    return update_params


def interrupted(folder, step):
    run = fakes.spec_in(folder)
    with pytest.raises(KeyboardInterrupt):
        fakes.execute(run, update_params=stop_at(step))
    return run


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    unbroken = fakes.spec_in(tmp_path / "a")
    fakes.execute(unbroken)
    run = interrupted(tmp_path / "b", step=25)
    newest = run.run_dir / "checkpoint_20"
    newest.write_bytes(newest.read_bytes()[:-100])
    fakes.execute(run)
    assert curve(run.run_dir) == curve(unbroken.run_dir)


def test_a_checkpoint_that_the_optimizer_refuses_is_named_in_a_line(tmp_path, monkeypatch):
    run = interrupted(tmp_path, step=25)

    def refuse(optimizer, state):
        raise ValueError("saved by another optimizer")

    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", refuse)
    with pytest.raises(UserError, match="checkpoint_20: optimizer: saved by another optimizer; "):
        fakes.execute(run)


def test_only_damaged_checkpoints_is_said_and_nothing_touched(tmp_path):
    run = interrupted(tmp_path, step=15)
    for path in run.run_dir.glob("checkpoint_*[0-9]"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    before = (run.run_dir / "eval_measurements.csv").read_bytes()
    with pytest.raises(UserError, match="checkpoint_10 is damaged"):
        fakes.execute(run)
    assert (run.run_dir / "eval_measurements.csv").read_bytes() == before


def test_a_finished_run_started_again_only_reports(tmp_path):
    run = fakes.spec_in(tmp_path)
    first = fakes.execute(run)
    before = {path: path.stat().st_mtime_ns for path in run.run_dir.iterdir()}
    assert fakes.execute(run) == first
    assert {path: path.stat().st_mtime_ns for path in run.run_dir.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hparams": {"learning_rate": 0.1}}, "hparams.learning_rate is 0.05 there and 0.1 now"),
        ({"seed": 2}, "seed is 1 there and 2 now"),
        ({"variant": "other"}, 'variant is "fake" there and "other" now'),
        ({"workload": {"max_steps": 50}}, "workload_properties.max_steps is 40 there and 50 now"),
    ],
)
def test_a_folder_of_another_run_is_left_alone(tmp_path, change, named):
    from dataclasses import replace

    run = fakes.spec_in(tmp_path)
    fakes.execute(run)
    before = {path: path.read_bytes() for path in run.run_dir.iterdir()}
    workload = fakes.FakeWorkload(**change.pop("workload", {}))
    with pytest.raises(UserError, match="holds another run: " + named):
        fakes.execute(replace(run, **change), workload)
    assert {path: path.read_bytes() for path in run.run_dir.iterdir()} == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path):
    run = fakes.spec_in(tmp_path)
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "eval_measurements.csv").write_text("global_step\n1\n")
    with pytest.raises(UserError, match="holds files but no run.json"):
        fakes.execute(run)
    assert [path.name for path in run.run_dir.iterdir()] == ["eval_measurements.csv"]


def test_two_processes_cannot_write_one_folder(tmp_path):
    run = fakes.spec_in(tmp_path)
    code = (
        "import sys, time; from pathlib import Path; from algoperf_shampoo.harness import "
        "run_lock\nwith run_lock.hold(Path(sys.argv[1])): print('held', flush=True); "
        "time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.run_dir)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline().strip() == b"held"
        with pytest.raises(UserError, match="another process is writing"):
            fakes.execute(run)
    finally:
        holder.kill()
        holder.wait()
    fakes.execute(run)


def test_a_run_stops_when_both_targets_are_reached(tmp_path):
    run = fakes.spec_in(tmp_path / "a")
    workload = fakes.FakeWorkload(validation_target_value=0.02, test_target_value=0.02)
    result = fakes.execute(run, workload)["result"]
    assert result["stop_reason"] == "targets reached" and result["global_step"] == 1
    one_only = fakes.spec_in(tmp_path / "b")
    workload = fakes.FakeWorkload(validation_target_value=0.02, test_target_value=2.0)
    result = fakes.execute(one_only, workload)["result"]
    assert result["stop_reason"] == "step budget spent"
    assert result["steps_to_target"] == 1  # the hit is the validation target's
    first = rows(one_only.run_dir / "eval_measurements.csv")[0]
    assert result["time_to_target"] == float(first["accumulated_submission_time"])


def slow(seconds, of):
    def slowed(*args, **kwargs):
        time.sleep(seconds)
        return of(*args, **kwargs)

    slowed.__signature__ = __import__("inspect").signature(of)
    return slowed


def test_only_the_submissions_own_time_is_on_the_clock(tmp_path):
    class SlowEval(fakes.FakeWorkload):
        def eval_model(self, *arguments):
            time.sleep(0.2)
            return super().eval_model(*arguments)

    run = fakes.spec_in(tmp_path)
    result = fakes.execute(
        run,
        SlowEval(max_steps=4, eval_period_steps=2),
        data_selection=slow(0.02, fakes._data_selection),
        update_params=slow(0.03, fakes._update_params),
        prepare_for_eval=slow(0.05, fakes._prepare_for_eval),
    )["result"]
    # 4 steps of 0.05 s and 3 evaluations (steps 1, 2, 4) prepared in 0.05 s each: 0.35 s
    assert 0.35 <= result["accumulated_submission_time"] < 0.6
    last = rows(run.run_dir / "eval_measurements.csv")[-1]
    assert float(last["accumulated_eval_time"]) >= 0.6
    assert float(last["total_duration"]) >= 0.95


def test_the_time_budget_ends_a_run_without_a_last_evaluation(tmp_path):
    run = fakes.spec_in(tmp_path)
    workload = fakes.FakeWorkload(max_allowed_runtime_sec=0.5, eval_period_steps=5)
    result = fakes.execute(run, workload, update_params=slow(0.06, fakes._update_params))["result"]
    assert result["stop_reason"] == "time budget spent" and result["global_step"] == 10
    steps = [row["global_step"] for row in rows(run.run_dir / "eval_measurements.csv")]
    assert steps == ["1", "5"]


def test_evaluation_by_wall_time_after_step_1_and_then_each_period(tmp_path, monkeypatch):
    now = [1e-3]  # a machine that was started just now

    def update_params(**given):
        now[0] += 0.05
        return fakes._update_params(**given)

    monkeypatch.setattr(runner, "_now", lambda: now[0])
    update_params.__signature__ = __import__("inspect").signature(fakes._update_params)
    run = fakes.spec_in(tmp_path)
    workload = fakes.FakeWorkload(eval_period_steps=None, eval_period_time_sec=0.19, max_steps=10)
    fakes.execute(run, workload, update_params=update_params)
    steps = [int(row["global_step"]) for row in rows(run.run_dir / "eval_measurements.csv")]
    assert steps == [1, 5, 9, 10]


def test_a_submission_may_end_its_own_run(tmp_path):
    def update_params(**given):
        raise TrainingCompleteError

    update_params.__signature__ = __import__("inspect").signature(fakes._update_params)
    result = fakes.execute(fakes.spec_in(tmp_path), update_params=update_params)["result"]
    assert result["stop_reason"] == "ended by the submission" and result["global_step"] == 1


def test_train_state_is_passed_read_only_and_only_when_asked_for(tmp_path):
    seen = []

    def update_params(**given):
        seen.append(dict(given["train_state"]))
        with pytest.raises(TypeError):
            given["train_state"]["is_time_remaining"] = False
        return fakes._update_params(**given)

    update_params.__signature__ = __import__("inspect").signature(fakes._update_params)
    fakes.execute(fakes.spec_in(tmp_path / "a"), update_params=update_params)
    assert len(seen) == 40 and seen[-1]["accumulated_submission_time"] > 0
    fakes.execute(
        fakes.spec_in(tmp_path / "b"), update_params=stop_at(None)
    )  # its signature has no train_state, so passing it would fail


def test_state_that_cannot_be_saved_is_refused_before_training(tmp_path):
    def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
        state = fakes._init_optimizer_state(
            workload, model_params, model_state, hyperparameters, rng
        )
        return {**state, "step": 3}

    run = fakes.spec_in(tmp_path)
    with pytest.raises(UserError, match=r"optimizer_state\['step'\] is a int without state_dict"):
        fakes.execute(run, init_optimizer_state=init_optimizer_state)
    assert not (run.run_dir / "run.json").exists()


def test_progress_line_says_step_metric_target_time_and_what_is_left(tmp_path):
    lines = []
    runner.execute(
        fakes.spec_in(tmp_path),
        fakes.FakeWorkload(max_allowed_runtime_sec=100.0),
        fakes.make_submission(),
        root=ROOT,
        echo=lines.append,
    )
    (hit,) = [line for line in lines if ": hit: " in line]
    assert "accuracy 0.9 reached at step " in hit and lines[-1].startswith("fake fake_mini")
    lines.remove(hit)
    assert len(lines) == 6
    assert lines[1].startswith("fake fake_mini seed 1 | step 10/40 | accuracy 0.")
    assert "(target 0.9000)" in lines[1] and re.search(r"s \| at most \d+ s left$", lines[1])
    assert lines[-1].endswith(f"; {tmp_path / 'fake/study_1/fake_mini_pytorch/trial_1'}")
