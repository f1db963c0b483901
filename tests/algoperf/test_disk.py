"""What of a run under AlgoPerf's runner is on disk, and a run whose launcher missed its end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from algoperf_shampoo.harness import disk, seal
from algoperf_shampoo.harness.algoperf import door, folder
from algoperf_shampoo.study import progress
from tests.algoperf.test_door import data, environment, facts, fake, plan, run

__all__ = ["data", "fake", "run"]  # fixtures


class Syncs:
    """``os`` that notes what is synced, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._open: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, *arguments: Any) -> int:
        descriptor = os.open(path, *arguments)
        self._open[descriptor] = Path(path).name
        return descriptor

    def fsync(self, descriptor: int) -> None:
        self.names.append(self._open[descriptor])


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    watch = Syncs()
    monkeypatch.setattr(disk, "os", watch)
    return watch.names


def test_all_that_tells_what_was_measured_is_synced_with_a_checkpoint(
    run: Any, synced: list[str]
) -> None:
    """The runner syncs nothing, and a reader needs the meta data: without them, no cell."""
    for name in ("meta_data_0.json", "flags_0.json", "measurements.csv"):
        (run.run_dir / name).write_text("{}")
    folder.keep_checkpoint(run.run_dir)
    sealed = sorted(name for name in os.listdir(run.run_dir) if "checkpoint" not in name)
    assert len(sealed) == 5
    # A whole checkpoint is gone on from: what it needs comes first, names included.
    here = run.run_dir.name
    assert synced == [*sealed, here, "checkpoint_10", here]


@pytest.mark.parametrize("name", ["meta_data_0.json", "flags_0.json", "hparams.json"])
def test_a_file_that_was_cut_short_is_set_aside(run: Any, name: str) -> None:
    (run.run_dir / "meta_data_1.json").write_text('{"a": 1}')
    (run.run_dir / name).write_bytes(b"")
    state = folder.examine(run, facts(run.run_dir / "checkpoint_10", 10), None)
    notes = folder.prepare(run, state, [run.hparams])
    assert notes[0] == f"{name} cannot be read: set aside"
    anew = name == folder.HPARAMS
    assert (run.run_dir / name).exists() == anew and (run.run_dir / "meta_data_1.json").exists()
    if anew:
        assert json.loads((run.run_dir / name).read_text()) == run.hparams


def test_a_run_that_ended_without_its_launcher_is_put_in_order(
    run: Any, data: Path, tmp_path: Path, fake: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or without power, between the last checkpoint and the last line of launches.json."""
    path = run.run_dir / "eval_measurements.csv"
    path.write_bytes(b"")  # a name on disk, its data not
    launch = {"how": None, "exit_code": None, "ended": None, "host": "elsewhere"}
    folder.write_json(run.run_dir / folder.LAUNCHES, [launch])
    known = facts(run.run_dir / "checkpoint_10", 10, training_complete=True)
    fake["environment"] = environment(gpus=2, checkpoints=known)
    said: list[str] = []
    asked = plan(data, tmp_path, seeds="1", steps="10", gpus="1", dry_run=False)
    assert asked.runs[0].run_dir == run.run_dir
    assert door.launch(asked, {"steps": "10"}, echo=said.append) == 0
    assert "2 rows lost or changed, put back from the checkpoint" in said[0]
    assert "complete already (step limit reached, step 10)" in said[-1]
    steps = [line.split(",")[0] for line in path.read_text().splitlines()]
    assert steps == ["global_step", "1", "10"]
    record = json.loads((run.run_dir / seal.NAME).read_text())
    assert seal.problems(run.run_dir, record, ended=True) == []
    assert progress.of(run.run_dir).state == progress.DONE
    said.clear()
    assert door.launch(asked, {"steps": "10"}, echo=said.append) == 0 and len(said) == 1
