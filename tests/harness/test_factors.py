"""factors.csv: written by the submission under both harnesses, and whole after any kill."""

from __future__ import annotations

import csv
import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch

from algoperf_shampoo import factor_log, submission
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import hparams, run_folder, runner, seal, submission_loader
from algoperf_shampoo.harness.algoperf import tables
from algoperf_shampoo.study import launch, plan
from tests.harness import fakes

ROOT = Path(__file__).parents[2]
VARIANT = "eshampoo_adaptive"


class Workload(fakes.FakeWorkload):
    """The fake one, called as AlgoPerf's are."""

    def model_fn(self, params, augmented_and_preprocessed_input_batch, *_, **__):
        return params(augmented_and_preprocessed_input_batch["inputs"]), None


def point():
    fields = submission_loader.fields(ROOT, VARIANT)
    path = ROOT / "search_spaces" / "mini" / f"{VARIANT}.json"
    (found,) = hparams.read_points(path, 1, fields)
    return found | {"precondition_frequency": 3, "tau": 0.2}


def execute(folder, stop_at=None, variant=VARIANT, hparams=None):
    """A run of 40 steps, evaluated at 1, 10, ...; ``stop_at``: interrupted there."""
    run = dataclasses.replace(fakes.spec_in(folder), hparams=hparams or point())
    own = submission_loader.load(ROOT, variant)

    def update_params(**given):
        if given["global_step"] == stop_at:
            raise KeyboardInterrupt
        return own.update_params(**given)

    mine = dataclasses.replace(
        own, update_params=update_params, needs_train_state=False, get_batch_size=lambda _: 16
    )
    try:
        runner.execute(run, Workload(), mine, root=ROOT, echo=lambda line: None)
    except KeyboardInterrupt:
        assert stop_at is not None
    return run.run_dir


def rows(path):
    with open(path / factor_log.NAME, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return execute(tmp_path_factory.mktemp("unbroken"))


def test_a_run_has_a_row_for_every_factor_and_check(unbroken):
    found = rows(unbroken)
    # The models' parameters are small: each is one vector, but for the one entry of the last.
    factors = [("0.weight", "weight"), ("0.bias", "bias"), ("2.weight", "weight")]
    seen = [(int(r["global_step"]), r["parameter"], r["kind"]) for r in found]
    assert seen == [(step, *factor) for step in range(3, 40, 3) for factor in factors]
    assert {r["factor"] for r in found} == {"A"}
    for parameter, _ in factors:
        mine = [r for r in found if r["parameter"] == parameter]
        refreshed = [int(r["refreshed"]) for r in mine]
        assert [int(r["checks"]) for r in mine] == list(range(1, 14))
        assert [int(r["refreshes"]) for r in mine] == [sum(refreshed[: i + 1]) for i in range(13)]
        assert 0 < sum(refreshed) < 13
    record = run_folder.read_record(unbroken)
    assert record["files"][factor_log.NAME]["rows"] == len(found)
    assert seal.problems(unbroken, record, ended=True) == []


@pytest.mark.parametrize("variant", ["off", "nadamw"])
def test_off_and_without_factors_there_is_no_file_and_no_other_number(
    unbroken, tmp_path, monkeypatch, variant
):
    if variant == "nadamw":
        fields = {f.name for f in submission.points.fields(["common"])}
        own = {name: value for name, value in point().items() if name in fields}
        assert not (execute(tmp_path, variant="nadamw", hparams=own) / factor_log.NAME).exists()
        return
    monkeypatch.setenv(factor_log.VARIABLE, "off")
    off = execute(tmp_path)
    assert not (off / factor_log.NAME).exists()
    ends = [run_folder.read_record(path)["result"]["params_sha256"] for path in (unbroken, off)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("damage", ["none", "rows after the checkpoint", "cut short", "gone"])
def test_a_run_that_was_killed_and_goes_on_has_each_row_once(unbroken, tmp_path, damage):
    run_dir = execute(tmp_path, stop_at=27)
    path = run_dir / factor_log.NAME
    assert {int(r["global_step"]) for r in rows(run_dir)} == set(range(3, 21, 3))  # of step 20
    if damage == "rows after the checkpoint":
        with open(path, "a") as file:
            file.write("21,0.weight,weight,0,A,30,0,,,,,,,,,\n24,0.wei")
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "gone":
        path.unlink()
    execute(tmp_path)
    assert path.read_bytes() == (unbroken / factor_log.NAME).read_bytes()
    assert seal.problems(run_dir, run_folder.read_record(run_dir), ended=True) == []


def test_a_word_that_is_no_setting_is_refused_before_a_run(monkeypatch, tmp_path):
    monkeypatch.setenv(factor_log.VARIABLE, "no")
    made = plan.make_plan(ROOT, ["nadamw"], out=str(tmp_path))
    with pytest.raises(UserError, match='SHAMPOO_TELEMETRY=no: here it is "off" or not set'):
        launch.launch(made)
    with pytest.raises(ValueError, match="SHAMPOO_TELEMETRY=no: it must be"):
        started(tmp_path)


# Under AlgoPerf's harness: what it calls, in its order.


def started(folder, monkeypatch=None):
    """Model, state and functions, as ``train_once`` begins; AlgoPerf has been imported."""
    if monkeypatch is not None:
        mode = types.SimpleNamespace(ForwardPassMode=types.SimpleNamespace(TRAIN="TRAIN"))
        monkeypatch.setitem(sys.modules, "algoperf.spec", mode)
        monkeypatch.setenv(factor_log.VARIABLE, str(folder))
    own = submission_loader.load(ROOT, VARIANT)
    workload = Workload()
    model, _ = workload.init_model_fn([7])
    model[1].p = 0.0
    given = hparams.as_namedtuple(point())
    state = own.init_optimizer_state(workload, model, None, given, None)
    queue = workload._build_input_queue([1, 2], "train", None, 16)
    return own, workload, model, given, state, queue


def train(run, first, last, evaluate=10):
    """Steps first to last; a checkpoint after each evaluation, as AlgoPerf makes it."""
    own, workload, model, given, state, queue = run
    common = {
        "workload": workload, "current_param_container": model, "current_params_types": None,
        "model_state": None, "hyperparameters": given, "loss_type": None,
        "optimizer_state": state, "eval_results": [], "rng": None,
    }  # fmt: skip
    saved = []
    for step in range(first, last + 1):
        own.update_params(**common, batch=next(queue), global_step=step - 1)
        if step % evaluate == 0:
            own.prepare_for_eval(**common, global_step=step)
            entries = {name: entry.state_dict() for name, entry in state.items()}
            torch.save([model.state_dict(), entries], path := workload.folder / f"{step}.pt")
            saved.append(path)
    return saved


def test_under_algoperf_rank_0_writes_when_a_checkpoint_is_saved(monkeypatch, tmp_path):
    """Killed after step 27, its file torn: from step 20's checkpoint on as if it had not been."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    run = started(whole, monkeypatch)
    run[1].folder = whole
    train(run, 1, 40)
    assert {int(r["global_step"]) for r in rows(whole)} == set(range(3, 40, 3))

    run = started(broken, monkeypatch)
    run[1].folder = broken
    train(run, 1, 27)
    with open(broken / factor_log.NAME, "a") as file:
        file.write("24,0.weight,weight,0,A,30,0,,,,,,,,,\n27,0.we")
    tables.bring_to(broken, {"global_step": 20, "eval_results": [], "preemption_count": 0})
    assert {int(r["global_step"]) for r in rows(broken)} == set(range(3, 21, 3))
    run = started(broken, monkeypatch)
    run[1].folder = broken
    model, entries = torch.load(broken / "20.pt")  # safe loading is torch's default
    run[2].load_state_dict(model)
    for name, entry in run[4].items():
        entry.load_state_dict(entries[name])
    run[5].skip(20)
    train(run, 21, 40)
    assert (broken / factor_log.NAME).read_bytes() == (whole / factor_log.NAME).read_bytes()


def test_under_algoperf_without_a_folder_nothing_is_watched(monkeypatch, tmp_path):
    run = started(tmp_path, monkeypatch)
    assert run[4]["optimizer"].telemetry is not None
    monkeypatch.delenv(factor_log.VARIABLE)
    own, workload, model, given, *_ = run
    state = own.init_optimizer_state(workload, model, None, given, None)
    assert state["optimizer"].telemetry is None
    assert set(state["monitor"].state_dict()) == {"batches", "sum", "count"}


def test_a_file_that_cannot_be_written_ends_no_training(monkeypatch, tmp_path, caplog):
    folder = tmp_path / "run"
    folder.mkdir()
    log = factor_log.FactorLog(folder, ("global_step", "factor"))
    log.append([{"global_step": 1, "factor": "L"}])
    folder.rename(tmp_path / "moved")
    log.append([{"global_step": 2, "factor": "R"}])
    assert "factors.csv: not written: No such file or directory" in caplog.text
    (tmp_path / "moved").rename(folder)
    log.append([{"global_step": 3, "factor": "A"}])
    assert [row["global_step"] for row in rows(folder)] == ["1", "2", "3"]


def test_a_checkpoint_of_before_telemetry_is_gone_on_from(monkeypatch, tmp_path):
    monitor = started(tmp_path, monkeypatch)[4]["monitor"]
    monitor.load_state_dict({"batches": 3, "sum": None, "count": 0})
    assert monitor.batches == 3 and not (tmp_path / factor_log.NAME).exists()
