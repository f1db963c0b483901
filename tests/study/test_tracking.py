"""Curves for TensorBoard and Weights & Biases, from a run's own files: one run, one record."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from algoperf_shampoo.harness import tracking
from algoperf_shampoo.study import events
from tests.faults.disks import NoSync, standing_in
from tests.harness import fakes
from tests.harness.test_runner import interrupted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path):
    """A run that was stopped and went on."""
    with standing_in(NoSync()):
        run = interrupted(tmp_path, step=15)
        fakes.execute(run)
    return run.run_dir


def test_the_checksum_is_castagnolis():
    assert events.crc32c(b"123456789") == 0xE3069283
    assert events.crc32c(bytes(32)) == 0x8A9136AA


def test_events_hold_every_evaluation_and_every_loss_once(run_dir):
    path = events.write(run_dir, started=1000.0)
    assert events.write(run_dir, started=1000.0) == path  # made anew, not a second one
    first, *found = events.read(path.read_bytes())
    assert first == (1000.0, 0, {})
    losses = [(step, v["train/step_loss"]) for _, step, v in found if "train/step_loss" in v]
    assert [step for step, _ in losses] == list(range(1, 41))
    evaluations = {step: v for _, step, v in found if "validation/accuracy" in v}
    assert list(evaluations) == [1, 10, 20, 30, 40]
    recorded = json.loads((run_dir / "run.json").read_text())
    assert evaluations[40]["score"] == pytest.approx(
        recorded["result"]["accumulated_submission_time"], rel=1e-6
    )
    times = [time for time, step, _ in found if step in evaluations]
    assert all(time > 1000.0 for time in times)
    damaged = bytearray(path.read_bytes())
    damaged[-6] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        events.read(bytes(damaged))


def test_losses_that_are_no_numbers_and_large_steps(tmp_path):
    (tmp_path / "step_losses.csv").write_text("global_step,loss\n1,nan\n300,inf\n70000,1e300\n")
    found = events.read(events.write(tmp_path, 1.0).read_bytes())[1:]
    assert [step for _, step, _ in found] == [1, 300, 70000]
    values = [v["train/step_loss"] for _, _, v in found]
    assert math.isnan(values[0]) and values[1:] == [math.inf, math.inf]


def test_tensorboard_reads_them(run_dir):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = events.write(run_dir, started=1000.0)
    read = loader.EventAccumulator(str(path)).Reload()
    assert [e.step for e in read.Scalars("validation/accuracy")] == [1, 10, 20, 30, 40]
    assert len(read.Scalars("train/step_loss")) == 40


def test_offline_without_a_key_online_with_one(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracking.is_offline()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert not tracking.is_offline()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.is_offline()


def test_the_curve_has_each_step_once(run_dir):
    found = tracking.curve(run_dir)
    assert [step for step, _ in found] == list(range(1, 41))
    assert [step for step, v in found if "validation/accuracy" in v] == [1, 10, 20, 30, 40]
    assert all("train/step_loss" in values for _, values in found)


def test_one_run_is_one_record_offline(run_dir):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    env |= {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", tracking.__name__, str(run_dir), "a run", "a group"]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    (path,) = folder.glob("*.wandb")
    store, steps = DataStore(), []
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        if message.HasField("run"):
            assert message.run.run_id == tracking.run_id(run_dir)
        for item in message.history.item:
            if "_step" in (item.key, *item.nested_key):
                steps.append(int(item.value_json))
    assert steps == list(range(1, 41))
