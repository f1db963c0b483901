"""Learning rates that are tuned: how one is chosen, and the two phases of such a study."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import plan, study
from algoperf_shampoo.study.claims import costs, figures, file, results, rule, tuning
from tests.harness import fakes
from tests.study.claims.test_file import GOOD, ROOT

RATES = {"adam": [0.0001, 0.05], "rotated": [0.001, 0.0002]}


def tuned(folder: Path, **changes: object) -> Path:
    """A file of claims whose two arms are tuned."""
    content = copy.deepcopy(GOOD)
    content["mini"]["evals"] = 20
    content["tuning"] = {"seeds": "7,8", "evals": 40}
    content["arms"] = {
        "adam": {"variant": "nadamw", "rates": RATES["adam"]},
        "rotated": {"variant": "eshampoo_fixed", "F": 7, "rates": RATES["rotated"]},
    }
    content |= changes
    path = folder / "mine.json"
    path.write_text(json.dumps(content))
    return path


def test_the_rate_with_the_lowest_mean_and_what_is_not_finite_ranks_worst():
    made = tuning.choose([1.0, 0.5, 2.0], {0.5: [3, 3], 1.0: [2, 3], 2.0: [1, math.inf]})
    assert made.rate == 1.0 and not made.at_edge and made.losses[2.0] == math.inf
    same = tuning.choose([2.0, 1.0], {1.0: [1.0], 2.0: [1.0]})
    assert same.rate == 1.0 and same.at_edge
    none = tuning.choose([1.0, 2.0], {1.0: [math.inf], 2.0: [math.inf]})
    assert none.rate == 1.0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tuning", {"seeds": "5,7"}, "tuning.seeds: 5 is reported as well"),
        ("tuning", {"evals": 5}, "no seeds"),
        ("arms", {"adam": {"variant": "nadamw", "rates": [1, 2]},
                  "rotated": {"variant": "soap", "rates": [1, 2, 3]}},
         "grids of one size for all arms, and there is adam 2, rotated 3"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, key, value, words):
    with pytest.raises(UserError, match=words):
        file.read(tuned(tmp_path, **{key: value}))


def test_such_a_study_has_no_rows_before_its_rates_are_known(tmp_path):
    with pytest.raises(UserError, match="tuned first: make claims CLAIMS=mine"):
        study.lay_out(ROOT, str(tuned(tmp_path)), study.Options())


def train(job: study.Job) -> None:
    """On the tiny workload; its evaluations are the study's, not the workload's."""
    fakes.execute(job.run, fakes.FakeWorkload(validation_target_value=0.2))


def test_rates_are_chosen_as_soon_as_their_runs_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "budget", lambda root, mini: 40)  # the tiny workload's
    path, out = tuned(tmp_path), str(tmp_path / "runs")
    phases = tuning.lay_out(ROOT, str(path), out, quick=False)
    assert phases.study.jobs == () and phases.tuning is not None
    assert len(phases.tuning.jobs) == 2 * 3 * 2 * 2 and len(phases.foreseen()) == 2 * 3 * 2
    assert {job.run.eval_period for job in phases.tuning.jobs} == {40}
    followed = []
    for job in phases.tuning.jobs:
        train(job)
        followed += (new := phases.after(job))
        assert len(new) in (0, 2)  # the seeds of one arm on one mini
    assert len(followed) == 12 and phases.foreseen() == () and phases.after(job) == []
    # The tiny workload trains at the larger of these rates.
    chosen = {"adam": 0.05, "rotated": 0.001}
    for (arm, _), choice in phases.choices.items():
        assert choice.rate == chosen[arm] == min(choice.losses, key=choice.losses.__getitem__)
    for job in followed:
        train(job)
    # A later look at the folders finds the same, and nothing to do.
    again = tuning.lay_out(ROOT, str(path), out, quick=False)
    assert again.choices == phases.choices
    assert {j.run.run_dir for j in again.study.jobs} == {j.run.run_dir for j in followed}
    found = results.outcome(again.declared, again.study, False, again.choices)
    assert len(found.runs) == 12 and found.verdicts[0].verdict == rule.CONTRADICTED
    page, record = results.markdown(found, ROOT, tmp_path), json.loads(results.to_json(found, ROOT))
    assert "Learning rates, chosen on seeds 7, 8:" in page and "| adam | fastmri | 0.05 |" in page
    assert "Table 2" not in page and record["rates"][0]["losses"].keys() == {"0.0001", "0.05"}
    header = "global_step,"
    evaluated = (followed[0].run.run_dir / "eval_measurements.csv").read_text().split()
    column = evaluated[0].split(",").index(header.rstrip(","))
    assert [row.split(",")[column] for row in evaluated[1:]] == ["1", "20", "40"]
    pytest.importorskip("matplotlib")
    (drawn,) = figures.draw(found, "claims_mine")
    assert drawn.name == "claims_mine_rates" and b"rotated" in drawn.files["svg"]


def test_a_run_that_diverges_is_the_worst_of_its_grid(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "budget", lambda root, mini: 40)
    path = tuned(tmp_path)
    phases = tuning.lay_out(ROOT, str(path), str(tmp_path / "runs"), quick=False)
    assert phases.tuning is not None

    class Diverging(fakes.FakeWorkload):
        def loss_fn(self, *given, **named):
            made = super().loss_fn(*given, **named)
            return {**made, "summed": made["summed"] * math.nan}

    for job in phases.tuning.jobs:
        bad = job.run.hparams["learning_rate"] == 0.05
        workload = (Diverging if bad else fakes.FakeWorkload)(validation_target_value=0.2)
        fakes.execute(job.run, workload)
        phases.after(job)
    for (arm, _), choice in phases.choices.items():
        if arm == "adam":
            assert choice.rate == 0.0001 and choice.losses[0.05] == math.inf
    assert len(phases.choices) == 6


def test_a_quick_one_takes_the_middle_and_tunes_nothing(tmp_path):
    phases = tuning.lay_out(ROOT, "family", str(tmp_path), quick=True)
    assert phases.tuning is None and phases.foreseen() == ()
    seeds, arms = phases.declared.quick_seeds, phases.declared.arms
    assert len(phases.study.jobs) == len(arms) * 3 * len(seeds)
    for job in phases.study.jobs:
        (arm,) = {file.place(row, arms)[0] for row in job.rows}
        assert job.run.hparams["learning_rate"] == phases.declared.rates[arm][2]


def test_every_variant_is_in_the_family_and_every_run_has_a_cost():
    for name in ("claims", "family"):
        phases = tuning.lay_out(ROOT, name, None, quick=False)
        jobs = [*phases.jobs, *phases.foreseen()]
        record = json.loads((ROOT / costs.RECORD).read_text())
        assert all(costs.seconds(job.run, record) for job in jobs)
        assert all(job.run.eval_period for job in jobs)
        if name == "family":
            modules = (ROOT / "submissions").glob("*/submission.py")
            known = {path.parent.name for path in modules}
            assert {job.run.variant for job in jobs} == known
    ordered = costs.longest_first(jobs, ROOT)
    lengths = [(job.run.seed, -(costs.seconds(job.run, record) or 0)) for job in ordered]
    assert lengths == sorted(lengths)


def test_the_door_takes_several_studies(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/claims.py", "--claims=claims,family", "--dry_run", "--jobs=60",
         f"--out={tmp_path}/o"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "1044 of 1044 runs to launch\n252 more follow" in done.stdout
    assert "core-seconds" in done.stdout and "on 60; by" in done.stdout
    assert not (tmp_path / "o").exists()
