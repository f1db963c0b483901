"""The targets in workloads_config/ are what the committed logs add up to."""

import json
import statistics
from pathlib import Path

import pytest

from algoperf_shampoo import workloads
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import differences, study, targets
from algoperf_shampoo.study.claims import archive
from algoperf_shampoo.study.logs import find_trials, read_trial

REPOSITORY = Path(__file__).parents[2]
MINIS = ("fastmri_mini", "imagenet_vit_mini", "ogbg_mini")


def test_the_configured_targets_follow_from_the_logs():
    logs = REPOSITORY / "results" / "measured" / "mini"
    configs = {
        name: json.loads(
            (REPOSITORY / "workloads_config" / f"{name.removesuffix('_mini')}.json").read_text()
        )["mini"]
        for name in MINIS
    }
    budgets = {name: config["max_steps"] for name, config in configs.items()}
    found = targets.measured_targets(logs / "grid" / "nadamw", logs / "targets", budgets)
    for target in found:
        config = configs[target.workload]
        assert config["validation_target_value"] == target.validation
        assert config["test_target_value"] == target.test
        # once more, without the function
        runs = [t for t in find_trials([logs / "targets"]) if t.workload == target.workload]
        rows = [e.row for t in runs for e in t.evaluations if e.step == 375]
        assert len(rows) == 3
        metric = f"validation/{config_metric(target)}"
        mean = statistics.mean(row[metric] for row in rows)
        assert 0 <= mean - target.validation < 1e-4


def config_metric(target):
    path = REPOSITORY / "workloads_config" / f"{target.workload.removesuffix('_mini')}.json"
    return json.loads(path.read_text())["target_metric_name"]


def test_a_missing_run_is_named(tmp_path):
    logs = REPOSITORY / "results" / "measured" / "mini"
    with pytest.raises(UserError, match="no runs of mnist_mini"):
        targets.measured_targets(logs / "grid" / "nadamw", logs / "targets", {"mnist_mini": 500})
    with pytest.raises(UserError, match="ogbg_mini: none; the rule wants 201, 202, 203"):
        targets.measured_targets(logs / "grid" / "nadamw", tmp_path, {"ogbg_mini": 500})
    with pytest.raises(UserError, match="seed 20[123], the grid's is 101"):
        targets.measured_targets(logs / "targets", logs / "targets", {"ogbg_mini": 500})


def test_no_run_that_is_reported_was_tuned_on():
    reported = find_trials([REPOSITORY / "results" / "measured" / "mini" / "seeds"])
    assert reported and {t.seed for t in reported}.isdisjoint({targets.GRID_SEED, *targets.SEEDS})


OF_THEIR_OWN = {
    "shampoo": "shampoo_F20",
    "shampoo_adaptive": "shampoo_adaptive_F10",
    "shampoo2_trace": "trace_F20",
    "kl_shampoo": "kl_shampoo_F2",
}
"""Rules without Adam's scale, and the arm of the study of all variants that has their F."""


def test_a_minis_point_is_the_papers_with_its_time_compressed_by_five():
    """One point for all workloads; what counts steps, or is the inverse of steps, by five. Rules
    without Adam's scale have the learning rate that was tuned for each."""
    own = {"step_hint_factor": 1.0, "max_preconditioner_dim": 128}
    record = json.loads((REPOSITORY / "results/measured/claims/family.json").read_text())
    tuned = {(entry["arm"], entry["mini"]): entry["rate"] for entry in record["rates"]}
    for path in sorted((REPOSITORY / "search_spaces" / "mini").glob("*.json")):
        (full,) = json.loads((REPOSITORY / "search_spaces" / path.name).read_text())
        space = json.loads(path.read_text())
        arm = OF_THEIR_OWN.get(path.stem)
        assert isinstance(space, dict) == (arm is not None)
        for workload in ("fastmri", "imagenet_vit", "ogbg"):
            (mini,) = space[workload] if arm else space
            own["learning_rate"] = tuned[arm, workload] if arm else 0.004
            assert mini.keys() == full.keys()
            for name, value in full.items():
                if name.startswith("one_minus_beta"):
                    assert mini[name] == pytest.approx(5 * value, rel=1e-15)
                elif name == "precondition_frequency":
                    assert mini[name] * 5 == value
                    kept = differences.staleness(full)
                    assert differences.staleness(mini) == pytest.approx(kept, rel=1e-15)
                else:
                    assert mini[name] == own.get(name, value)
    for name in ("table1", "table3"):
        content = json.loads((study.STUDIES / f"{name}.json").read_text())
        asked = {row["F"] for row in content["rows"]}
        mapped = content["mini"]["F"]
        assert {int(f) for f in mapped} == asked
        for f, mini_f in mapped.items():
            assert mini_f is None if int(f) < 5 else 5 * mini_f == int(f)


def test_targets_that_no_run_reaches(tmp_path):
    configs = [REPOSITORY / "workloads_config" / "ogbg.json"]
    targets.write_unreachable(configs, tmp_path / "new")
    there, here = workloads.load("ogbg_mini", tmp_path / "new"), workloads.load("ogbg_mini")
    assert (there.validation_target_value, there.test_target_value) == (1.0, 1.0)
    assert (there.step_hint, there.max_steps) == (here.step_hint, here.max_steps)
    with pytest.raises(FileExistsError):
        targets.write_unreachable(configs, tmp_path / "new")


def test_only_the_minis_targets_are_rewritten(tmp_path):
    config = tmp_path / "x.json"
    mini = '{"validation_target_value": 0.1,\n  "test_target_value": 0.2}'
    text = '{"full": {"validation_target_value": 1.5},\n "mini": ' + mini + "}"
    config.write_text(text)
    targets.write_target(config, targets.Target("x_mini", 0.1, 0.75, 0.5, ()))
    read = json.loads(config.read_text())
    assert read["full"]["validation_target_value"] == 1.5
    assert read["mini"] == {"validation_target_value": 0.75, "test_target_value": 0.5}


def test_the_document_says_what_rules_without_adams_scale_give():
    text = (REPOSITORY / "docs" / "minis.md").read_text(encoding="utf-8")
    runs = REPOSITORY / "results" / "measured" / "mini" / "own_rates_runs.tar.xz"
    with archive.unpacked(runs) as there:
        for variant in OF_THEIR_OWN:
            cells = []
            for mini in ("fastmri", "imagenet_vit", "ogbg"):
                trial = read_trial(
                    there.folder / variant / "study_1" / f"{mini}_mini_pytorch" / "trial_1"
                )
                best = max(evaluation.value for evaluation in trial.evaluations)
                steps = trial.steps_to_target
                hit = f"hit at {steps}" if steps else f"missed, {best:.4f}"
                cells.append(f"{trial.hparams['learning_rate']:g}: {hit}")
            frequency = trial.hparams["precondition_frequency"]
            assert f"| `{variant}` | {frequency} | {' | '.join(cells)} |" in text
