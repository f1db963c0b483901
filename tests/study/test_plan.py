"""Plans: seeds, overrides, labels and folders; launching with a failing run among others."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from pathlib import Path

import pytest

from algoperf_shampoo import points
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import run_folder
from algoperf_shampoo.study import launch, plan
from tests.harness import fakes

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("1", [1]), ("3", [1, 2, 3]), ("3,4,5", [3, 4, 5]), ("0,", [0]), ("7,", [7])],
)
def test_seeds_are_a_count_or_a_list(text, seeds):
    assert plan.parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["abc", "0", "-1", "1.5", "", ",", "1,,2", "3,3", "1_0", "²", "5000"]
)
def test_bad_seeds_are_named(text):
    with pytest.raises(UserError, match="SEEDS="):
        plan.parse_seeds(text)


def test_a_plan_lays_out_label_study_workload_trial():
    made = plan.make_plan(ROOT, ["eshampoo-adaptive"], seeds="4,2", f="20", tau="0.05", out="o")
    assert [run.workload for run in made.runs[::2]] == [
        "fastmri_mini",
        "imagenet_vit_mini",
        "ogbg_mini",
    ]
    run = made.runs[1]
    assert run.run_dir == (
        ROOT / "o/eshampoo_adaptive_F20_tau0.05/study_2/fastmri_mini_pytorch/trial_1"
    )
    assert (run.hparams["precondition_frequency"], run.hparams["tau"]) == (20, 0.05)
    assert made.harness == "embedded"


def test_settings_are_in_point_and_label():
    words = "one_dim=adam learning_rate=0.02 precondition_frequency=7"
    made = plan.make_plan(ROOT, ["eshampoo_fixed"], settings=words, steps="30", out="o")
    assert {run.label for run in made.runs} == {"eshampoo_fixed_F7_lr0.02_1dadam_steps30"}
    assert made.steps == 30
    for run in made.runs:
        assert (run.hparams["one_dim"], run.hparams["learning_rate"]) == ("adam", 0.02)
        assert run.hparams["precondition_frequency"] == 7
    for harness, size in (("algoperf", "mini"), ("algoperf", "full")):
        full = plan.make_plan(
            ROOT, ["eshampoo_fixed"], settings="one_dim=adam", size=size, harness=harness
        )
        assert {run.label for run in full.runs} == {"eshampoo_fixed_1dadam"}


def test_labels_stay_short_file_names_and_differ():
    values = {}
    for field in points.DECLARED:
        kind = field.kind
        if isinstance(kind, points.Number):
            values[field.name] = kind.low + 1 if kind.integer else (kind.low + kind.high) / 3
        else:
            values[field.name] = True if isinstance(kind, points.Switch) else kind.words[0]
    label = points.label(values)
    assert len(label.encode()) <= 140 and re.fullmatch(r"[A-Za-z0-9._-]+", label)
    assert label != points.label({**values, "exponent_multiplier": 3.0})
    one = [points.label({name: value}) for name, value in values.items()]
    assert len(set(one)) == len(one) and all(len(word) < 40 for word in one)
    assert points.label({"learning_rate": 1}) == points.label({"learning_rate": 1.0})


def test_a_variant_without_a_point_for_the_minis_is_asked_for_one(tmp_path):
    for folder in ("submissions/nadamw", "search_spaces"):
        shutil.copytree(ROOT / folder, tmp_path / folder.replace("nadamw", "mine"))
    (tmp_path / "search_spaces/nadamw.json").rename(tmp_path / "search_spaces/mine.json")
    with pytest.raises(UserError, match="^search_spaces/mini/mine.json: not there"):
        plan.make_plan(tmp_path, ["mine"])
    assert plan.make_plan(tmp_path, ["mine"], size="full").runs
    space = "search_spaces/mini/nadamw.json"
    assert plan.make_plan(tmp_path, ["mine"], search_space=space).runs
    (tmp_path / space).rename(tmp_path / "search_spaces/mini/mine.json")
    assert plan.make_plan(tmp_path, ["mine"]).runs


def test_a_shorter_budget_ends_the_run_there(tmp_path, fake_submission):
    run = fakes.spec_in(tmp_path)
    short = dataclasses.replace(fake_plan(tmp_path, [run]), steps=12)
    launch.launch(short, load_workload=lambda name: fakes.FakeWorkload())
    assert run_folder.read_record(run.run_dir)["result"]["global_step"] == 12


def test_full_size_means_algoperf_and_its_own_folder():
    made = plan.make_plan(ROOT, ["shampoo_grafting"], workload="ogbg", size="full")
    assert made.harness == "algoperf" and made.runs[0].workload == "ogbg"
    assert made.out == ROOT / "results" / "runs" / "full"


def test_different_points_never_share_a_folder():
    folders = set()
    for f, tau in (
        (None, None),
        ("50", None),
        ("50", "0.1"),
        (None, "0"),
        ("5", "0.1"),
        ("50", "0.01"),
    ):
        folders |= {
            r.run_dir for r in plan.make_plan(ROOT, ["eshampoo_adaptive"], f=f, tau=tau).runs
        }
    assert len(folders) == 6 * 3


def fake_plan(tmp_path, runs):
    return plan.Plan(ROOT, "embedded", "mini", tmp_path, tuple(runs), {})


@pytest.fixture
def fake_submission(monkeypatch):
    monkeypatch.setattr(
        "algoperf_shampoo.harness.submission_loader.load", lambda *_: fakes.make_submission()
    )


def test_a_failing_run_does_not_stop_the_next(tmp_path, fake_submission):
    first, second = fakes.spec_in(tmp_path, seed=1), fakes.spec_in(tmp_path, seed=2)
    first.hparams["learning_rate"] = "no number"
    lines = []
    failed = launch.launch(
        fake_plan(tmp_path, [first, second]),
        load_workload=lambda name: fakes.FakeWorkload(),
        echo=lines.append,
    )
    assert failed == 1
    assert run_folder.read_record(second.run_dir)["status"] == "finished"
    assert any("seed 1: failed" in line for line in lines) and lines[-1] == "1 of 2 runs failed"


def test_one_process_or_several_the_same_curve(tmp_path, fake_submission):
    """Runs after others in one process give what each gives alone."""
    runs = [fakes.spec_in(tmp_path / "together", seed=seed) for seed in (1, 2)]
    launch.launch(fake_plan(tmp_path, runs), load_workload=lambda name: fakes.FakeWorkload())
    alone = fakes.execute(fakes.spec_in(tmp_path / "alone", seed=2))
    together = run_folder.read_record(runs[1].run_dir)
    assert together["result"]["params_sha256"] == alone["result"]["params_sha256"]


def test_nothing_starts_when_one_folder_holds_another_run(tmp_path, fake_submission):
    first, second = fakes.spec_in(tmp_path, seed=1), fakes.spec_in(tmp_path, seed=2)
    fakes.execute(second)
    second.hparams["learning_rate"] = 0.2
    with pytest.raises(UserError, match="holds another run"):
        launch.launch(
            fake_plan(tmp_path, [first, second]), load_workload=lambda name: fakes.FakeWorkload()
        )
    assert not first.run_dir.exists()


def test_wandb_is_to_be_there_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="WANDB=1: no module wandb here"):
        plan.make_plan(ROOT, ["nadamw"], out=str(tmp_path), wandb=True)
