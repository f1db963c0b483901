"""Power cuts: whatever a disk had not been told to keep is lost, and the run is none the worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from algoperf_shampoo.harness import record, runner, seal
from algoperf_shampoo.study import logs
from tests.faults.disks import Image, NoSync, Recorder, standing_in
from tests.harness import fakes
from tests.harness.test_runner import curve, stop_at

TARGET = 0.9
"""Reached by the stand-in workload at step 20, missed at 30, reached again at 40."""


def workload() -> fakes.FakeWorkload:
    return fakes.FakeWorkload(validation_target_value=TARGET)


def recorded(root: Path, before: Image | None = None, stop: int | None = None, **options):
    """A run below ``root``, from an image or from nothing, and the recorder of its disk."""
    if before is None:
        root.mkdir()
    else:
        before.restore(root)
    saved: list[int] = [] if before is None or before.saved_step is None else [before.saved_step]
    recorder = Recorder(root, saved_step=lambda: saved[-1] if saved else None, **options)
    save = runner._Training._save

    def noting(self):
        save(self)
        saved.append(self.global_step)

    runner._Training._save = noting
    try:
        with standing_in(recorder):
            replaced = {} if stop is None else {"update_params": stop_at(stop)}
            fakes.execute(fakes.spec_in(root), workload(), **replaced)
    except KeyboardInterrupt:
        pass
    finally:
        runner._Training._save = save
    return recorder


def cell(run_dir: Path) -> tuple:
    """What a table says of a run, its times left out."""
    trial = logs.read_trial(run_dir)
    steps = [evaluation.step for evaluation in trial.evaluations]
    return trial.outcome, trial.steps_to_target, steps, trial.holes


def problem_of(image: Image, place: Path, expected: tuple) -> str | None:
    """What is wrong with the run that goes on from an image; None if nothing is."""
    image.restore(place)
    run = fakes.spec_in(place)
    if (run.run_dir / "run.json").exists():
        found = json.loads((run.run_dir / "run.json").read_bytes())
        problems = seal.problems(run.run_dir, found, found["status"] == "finished")
        if problems:
            return f"seal: {problems}"
    lines: list[str] = []
    try:
        with standing_in(NoSync()):
            fakes.execute(run, workload(), echo=lines.append)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if (curve(run.run_dir), cell(run.run_dir)) != expected:
        return "another curve or cell"
    went_on = next((int(x.split("step ")[1].split(",")[0]) for x in lines if "continuing" in x), 0)
    if "finished before" not in lines[0] and went_on < (image.saved_step or 0):
        return f"went on from step {went_on}, though {image.saved_step} was safe"
    return None


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    run = fakes.spec_in(tmp_path_factory.mktemp("unbroken"))
    fakes.execute(run, workload())
    outcome, steps, evaluated, holes = cell(run.run_dir)
    assert (outcome, evaluated, holes) == ("hit", [1, 10, 20, 30, 40], []) and steps == 20
    return curve(run.run_dir), (outcome, steps, evaluated, holes)


def different(images: list[Image]) -> list[Image]:
    kept: dict[str, Image] = {}
    for image in images:
        kept.setdefault(repr((sorted(image.files.items(), key=str), image.saved_step)), image)
    return list(kept.values())


def test_a_run_goes_on_from_a_power_cut_at_a_few_moments(tmp_path, expected):
    images = different(recorded(tmp_path / "run").images)
    assert len(images) > 60
    for number, image in enumerate(images[5 :: len(images) // 5]):
        assert problem_of(image, tmp_path / f"cut_{number}", expected) is None, image.after


@pytest.mark.faults
def test_a_run_goes_on_from_a_power_cut_at_any_moment(tmp_path, expected):
    first = recorded(tmp_path / "first", stop=25)
    second = recorded(tmp_path / "second", before=first.images[-2])
    for name, recorder in (("first", first), ("second", second)):
        images = different(recorder.images)
        assert len(images) > 30
        for number, image in enumerate(images):
            place = tmp_path / f"{name}_{number}"
            assert problem_of(image, place, expected) is None, f"{name} {number} {image.after}"


def is_table(path: Path) -> bool:
    return path.name.strip(".").removesuffix(".tmp").endswith(".csv")


@pytest.mark.faults
@pytest.mark.parametrize("removed", ["names", "checkpoints", "rows and their rebuilding"])
def test_without_the_mending_power_cuts_do_harm(tmp_path, expected, removed, monkeypatch):
    def honest(kind: str, path: Path) -> bool:
        if removed == "names":
            return kind == "file"
        if removed == "checkpoints":
            return kind == "folder" or "checkpoint" not in path.name
        return kind == "folder" or not is_table(path)

    images = different(recorded(tmp_path / "run", honest=honest).images)
    if removed == "rows and their rebuilding":
        monkeypatch.setattr(record.CsvTable, "_restore", lambda self: None)
        monkeypatch.setattr(seal, "problems", lambda *arguments, **keywords: [])
    assert any(
        problem_of(image, tmp_path / f"cut_{number}", expected)
        for number, image in enumerate(images)
    )
