"""Repeating a run from its folder: the same hash, or what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import seal
from algoperf_shampoo.study import launch, plan, repeat

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """Three steps of a mini with a point and a budget of its own."""
    made = plan.make_plan(
        ROOT,
        ["eshampoo_adaptive"],
        workload="ogbg",
        seeds="5,",
        f="2",
        settings="learning_rate=0.02",
        steps="3",
        out=str(tmp_path_factory.mktemp("runs")),
    )
    assert launch.launch(made, echo=lambda line: None) == 0
    return made.runs[0].run_dir


@pytest.fixture(scope="module")
def again(run_dir, tmp_path_factory) -> repeat.Recorded:
    out = tmp_path_factory.mktemp("again")
    return repeat.execute(repeat.read(run_dir), out, ROOT, echo=lambda line: None)


def test_a_repetition_ends_with_the_same_hash(run_dir, again):
    old = repeat.read(run_dir)
    assert again.folder != run_dir and again.identity == old.identity
    assert again.record["result"]["global_step"] == 3
    same, lines = repeat.report(old, again, ROOT)
    digest = old.record["result"]["params_sha256"]
    assert same and lines[1:] == [
        f"parameters: the same hash, {digest}",
        "losses: the same at all 3 steps that both have",
    ]


def test_where_it_ends_otherwise_what_differs_is_named(run_dir, again, tmp_path):
    record = json.loads((run_dir / "run.json").read_text())
    record["result"]["params_sha256"] = "0" * 64
    record["sessions"][-1]["packages"]["torch"] = "2.0.0"
    record["sessions"][-1]["cpu_model_name"] = "Another CPU"
    record["sessions"][-1]["git_commit_hash"] = "abc123"
    record["identity"]["source_sha256"]["optimizer"] = "1" * 64
    (tmp_path / "run.json").write_text(json.dumps(seal.signed(record)))
    losses = (run_dir / "step_losses.csv").read_text().splitlines()
    changed = losses[:2] + [losses[2] + "1"] + losses[3:]
    (tmp_path / "step_losses.csv").write_text("\n".join(changed) + "\n")
    same, lines = repeat.report(repeat.read(tmp_path), again, ROOT)
    text = "\n".join(lines)
    assert not same and f"parameters: {'0' * 64} there," in text
    assert f"losses: apart from step 2 on, {losses[2].split(',')[1]}1 and " in text
    assert "packages.torch: 2.0.0, " in text and "cpu_model_name: Another CPU, " in text
    assert "source_sha256.optimizer: 111111111111..., " in text
    assert "git checkout abc123" in text


def test_a_run_that_did_not_finish_is_compared_by_its_losses(run_dir, again, tmp_path):
    record = json.loads((run_dir / "run.json").read_text())
    del record["result"]
    record["status"] = "running"
    (tmp_path / "run.json").write_text(json.dumps(seal.signed(record)))
    (tmp_path / "step_losses.csv").write_bytes((run_dir / "step_losses.csv").read_bytes()[:-2])
    same, lines = repeat.report(repeat.read(tmp_path), again, ROOT)
    assert "the run is running, not finished" in lines[1] and not same
    assert "losses: apart from step 3 on" in lines[2]  # a row that was cut short is another number


def test_what_is_no_run_is_said(run_dir, tmp_path):
    for folder, words in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "no run.json in it"),
        (run_dir.parents[2], f"RUN={run_dir} is one"),
    ):
        with pytest.raises(UserError, match=words):
            repeat.read(folder)
    (tmp_path / "run.json").write_text('{"identity": {"variant": "nadamw"}}')
    with pytest.raises(UserError, match="no identity.label"):
        repeat.read(tmp_path)
    (tmp_path / "launches.json").write_text("[]")
    with pytest.raises(UserError, match="AlgoPerf's harness"):
        repeat.read(tmp_path)


def test_new_folders_are_new(tmp_path):
    assert repeat.new_folder(tmp_path) == tmp_path / "results/repeats/1"
    (tmp_path / "results/repeats/1").mkdir(parents=True)
    assert repeat.new_folder(tmp_path) == tmp_path / "results/repeats/2"


def test_a_repetition_goes_into_a_folder_of_its_own(run_dir, again):
    for out in (run_dir.parents[3], again.folder.parents[3]):
        with pytest.raises(UserError, match="OUT=: .* (the run itself|a run that is over)"):
            repeat.execute(repeat.read(run_dir), out, ROOT, echo=pytest.fail)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("sessions", [1]),
        ("identity.workload_properties.max_steps", "x"),
        ("identity.workload_properties", []),
        ("identity.hparams", [1]),
        ("identity.label", "../../elsewhere"),
        ("identity.seed", -1),
        ("identity.eval_period_steps", 0),
        ("result", [1]),
    ],
)
def test_a_record_that_was_changed_is_refused_in_one_line(run_dir, tmp_path, place, value):
    record = json.loads((run_dir / "run.json").read_text())
    *above, name = place.split(".")
    part = record
    for key in above:
        part = part[key]
    part[name] = value
    for content, words in (
        (record, "its own digest differs"),
        (seal.signed(record), f"{place} is .*: cannot be repeated"),
    ):
        (tmp_path / "run.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=words) as caught:
            repeat.read(tmp_path)
        assert "\n" not in str(caught.value)
