"""Published logs of every version, ruleset and workload, held against pandas and the settings."""

from __future__ import annotations

import collections
import json
import math
from pathlib import Path

import pytest

from algoperf_shampoo import versions
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import logs, tables
from tests.study import published_pandas
from tests.study.published_pandas import DATA

ROOT = Path(__file__).parents[2]
EXPECTED = json.loads((DATA / "expected.json").read_text())


@pytest.fixture(scope="module")
def trials() -> dict[str, logs.Trial]:
    return {t.path.relative_to(DATA).as_posix(): t for t in logs.find_trials([DATA])}


def test_hits_steps_and_times_are_those_of_pandas(trials):
    assert trials.keys() == EXPECTED.keys() and len(trials) == 65
    for name, trial in trials.items():
        read = trial.steps_to_target and (trial.steps_to_target, trial.time_to_target)
        assert published_pandas.same(read, EXPECTED[name]), name
    assert sum(hit is not None for hit in EXPECTED.values()) > 40


def test_what_pandas_says_is_what_is_written_down():
    pytest.importorskip("pandas", reason="the recorded figures stand for it")
    for name, hit in EXPECTED.items():
        assert published_pandas.same(published_pandas.first_hit(DATA / name), hit), name


def test_versions_have_the_settings_that_published_logs_have(trials):
    """Each log's meta data is its version's entry, but for an evaluation period used before it."""
    seen = collections.Counter()
    for name, trial in trials.items():
        version = versions.read(name.split("/")[0])
        path = trial.path / "meta_data_0.json"
        if not path.exists():
            continue
        meta = json.loads(path.read_text())
        settings = version.workloads[trial.workload]
        assert meta["workload.target_metric_name"] == settings.target_metric_name
        for key in ("step_hint", "max_allowed_runtime_sec", "validation_target_value"):
            assert meta[f"workload.{key}"] == getattr(settings, key), (name, key)
        test = settings.test_target_value
        if test is None:
            assert "workload.test_target_value" not in meta
        else:
            assert meta["workload.test_target_value"] == pytest.approx(test, rel=1e-12)
        early = "git_commit_hash" not in meta and version.name == "v0.5"
        if not (early and trial.workload.startswith("criteo1tb")):
            assert meta["workload.eval_period_time_sec"] == settings.eval_period_time_sec, name
        assert (meta["gpu_model_name"], meta["gpu_count"]) == (version.gpu, version.gpu_count)
        assert meta.get("git_commit_hash") in (None, *version.algoperf_commits)
        seen[version.name, trial.ruleset] += 1
    assert seen["v0.5", "external"] >= 19 and seen["v0.5", "self"] == 16
    assert seen["v0.6", "external"] >= 8 and seen["v0.6", "self"] >= 8 and seen["2026", "self"] >= 4


def test_no_self_tuning_run_took_longer_than_its_factor(trials):
    longest = collections.defaultdict(float)
    for name, trial in trials.items():
        if trial.evaluations and trial.ruleset == "self":
            version = versions.read(name.split("/")[0])
            spent = trial.evaluations[-1].submission_time
            assert spent <= version.budget(trial.workload, "self")
            share = spent / version.budget(trial.workload, "external")
            longest[version.name] = max(longest[version.name], share)
    assert 1.5 < longest["v0.5"] <= 3  # which is how v0.5's factor is seen to be 3


def test_every_trial_is_told_its_version_ruleset_and_framework(trials):
    for name, trial in trials.items():
        version, ruleset, *_ = name.split("/")
        assert ruleset.startswith(trial.ruleset)
        assert trial.framework in ("jax", "pytorch")
        if trial.metric is not None:
            # criteo1tb is the same in both; a log without a known commit could be of either.
            assert trial.version in (version, "v0.5 or v0.6"), name
            assert trial.version == version or trial.workload == "criteo1tb"


def test_a_folder_without_a_workloads_name_is_read_by_its_flags(trials):
    (name,) = [name for name in trials if name.split("/")[4].startswith("trial_")]
    trial = trials[name]
    assert (trial.label, trial.study) == ("schedule_free_adamw", "study_0")
    flags = json.loads((trial.path / "flags_0.json").read_text())
    assert (trial.workload, trial.framework) == (flags["workload"], flags["framework"])
    assert trial.outcome == "hit"


def test_rows_are_per_version_ruleset_and_framework_and_their_names_are_their_own(trials):
    (full,) = [t for t in tables.table1(list(trials.values()), ROOT) if t.size == "full"]
    rows = [row for row in full.rows if row.runs]
    names = collections.Counter((row.workload, row.name) for row in rows)
    assert [name for name, count in names.items() if count > 1] == []
    assert sum(len(row.runs) for row in rows) == len(trials)


def test_baselines_of_two_versions_and_rulesets_are_told_apart(tmp_path):
    for number, name in enumerate(("v0.5/self_tuning", "v0.6/external_tuning")):
        source = next((DATA / name).glob("*/study_*/criteo1tb_*/trial_*"))
        target = tmp_path / str(number) / "label" / "study_0" / source.parent.name / source.name
        target.parent.mkdir(parents=True)
        target.symlink_to(source)
    trials = logs.find_trials([tmp_path])
    rows = [row for table in tables.table1(trials, ROOT) for row in table.rows if row.runs]
    assert [len(row.runs) for row in rows] == [1, 1]
    assert len({row.name for row in rows}) == 2


def test_published_runs_at_the_papers_point_stand_beside_shampoo_grafting():
    published = logs.find_trials([DATA.parent / "published_v06" / "shampoo"])
    (full,) = [t for t in tables.table1(published, ROOT) if t.size == "full"]
    beside = [row for row in full.rows if row.runs and row.paper]
    assert [(row.workload, row.label, row.hits, row.ended) for row in beside] == [
        ("FastMRI", "shampoo trial 2", 3, 3),
        ("ImageNet ViT", "shampoo trial 2", 3, 3),
        ("OGBG", "shampoo trial 2", 3, 3),
    ]
    assert {row.paper["variant"] for row in beside if row.paper} == {"shampoo_grafting"}
    assert any(row.label == "shampoo" and not row.paper for row in full.rows)  # trial 1 is not


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "v0.7"}, "version is 'v0.7'; it must be 'v0.6'"),
        ({"self_tuning_budget_factor": 0}, "self_tuning_budget_factor is 0.0; it must be a number"),
        ({"gpus": {"name": "x"}}, "key gpus.count is missing"),
        ({"base_workloads": ["mnist"]}, "base_workloads names 'mnist', which workloads lacks"),
        ({"workloads": {"ogbg": {"step_hint": 1}}}, "key workloads.ogbg.eval_period_time_sec is"),
        ({"workloads": {"ogbg": []}}, "workloads.ogbg is []; it must be an object"),
        ({"extra": 1}, "key extra is unknown"),
    ],
)
def test_mistakes_in_a_versions_file_are_named(tmp_path, change, message):
    (tmp_path / "versions").mkdir()
    content = json.loads((versions.CONFIG_DIR / "versions" / "v0.6.json").read_text())
    (tmp_path / "versions" / "v0.6.json").write_text(json.dumps(content | change))
    with pytest.raises(UserError) as caught:
        versions.read("v0.6", tmp_path)
    assert message in str(caught.value) and "v0.6.json" in str(caught.value)


def test_unknown_versions_and_settings():
    with pytest.raises(UserError, match="AlgoPerf version 'v7': there is v0.5, v0.6, 2026"):
        versions.read("v7")
    assert versions.identify("ogbg", 52000, 0.28098, 12011) == "v0.6"
    assert versions.identify("ogbg", 52000, 0.28098, 11303) == "2026"
    assert versions.identify("ogbg", 80000, 0.28098, 18477) == "v0.5"
    assert versions.identify("ogbg", 52000, 0.3, 12011) == "unknown"
    assert versions.identify("mnist", 52000, 0.28098, 12011) == "unknown"
    assert versions.identify("criteo1tb", 10666, 0.123735, 7703) == "v0.5 or v0.6"
    commit = versions.read("v0.6").algoperf_commits[0]
    assert versions.identify("criteo1tb", 10666, 0.123735, 7703, commit) == "v0.6"
    assert versions.self_tuning_factor("v0.6") == 1.5
    assert versions.self_tuning_factor("unknown") == 3
    assert math.isclose(versions.read("2026").budget("ogbg", "self"), 1.5 * 11303)
