"""Mistakes in a file of claims, each named in one line, and the study that a file lays out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.study import plan, study
from algoperf_shampoo.study.claims import file

ROOT = Path(__file__).parents[3]
GOOD: dict[str, Any] = {
    "title": "Claims",
    "mini": {"seeds": "5,6", "all_steps": True},
    "quick": {"seeds": "5,", "steps": 20},
    "arms": {
        "adam": {"variant": "nadamw", "set": {"learning_rate": 0.5}},
        "rotated": {"variant": "eshampoo_fixed", "F": 7},
    },
    "claims": [
        {
            "name": "better", "source": "here", "hypothesis": "It is.",
            "parts": [{"statistic": "loss", "low": ["rotated"], "high": ["adam"], "rule": "less"}],
        },
        {"name": "later", "source": "here", "hypothesis": "It is.", "waits_for": ["a variant"]},
    ],
}  # fmt: skip


def write(path: Path, *keys: Any, value: Any) -> Path:
    content = copy.deepcopy(GOOD)
    inner: Any = content
    for key in keys[:-1]:
        inner = inner[key]
    if value is None:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(content))
    return path


def test_the_study_has_a_row_for_each_arm_and_mini(tmp_path):
    path = write(tmp_path / "mine.json", "title", value="Claims")
    declared = file.read(path)
    made = study.lay_out(ROOT, str(path), study.Options())
    assert made.rows == 6 and len(made.jobs) == 12
    for job in made.jobs:
        ((arm, mini),) = [file.place(row, declared.arms) for row in job.rows]
        assert job.run.workload == f"{mini}_mini" and not job.run.stop_at_target
        assert job.run.label.endswith("_allsteps") and ("ALL_STEPS", "1") in job.words
        assert (arm == "adam") == (job.run.variant == "nadamw")
    assert {job.run.seed for job in made.jobs} == {5, 6}
    assert [declared.quick_seeds, declared.quick_steps] == [(5,), 20]
    assert [c.waits_for for c in declared.claims] == [(), ("a variant",)]


PART = ("claims", 0, "parts", 0)


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("quick",), None, "no quick"),
        (("rows",), [1], "unknown key 'rows'"),
        (("mini", "all_steps"), None, "mini.all_steps: true"),
        (("mini", "F"), {"100": 20}, "mini.F: leave it out"),
        (("mini", "seeds"), "x", "SEEDS=x"),
        (("quick", "steps"), 0, "quick.steps is 0"),
        (("arms", "third"), {"variant": "nadamw"}, "arm third: no claim has it"),
        (("arms", "adam"), {"F": 3}, "arm adam: no variant"),
        (("arms", "adam", "rates"), [0.1, 0.2], r"arm adam: rates: or set.learning_rate, not both"),
        (("arms", "rotated", "rates"), [0.1, 0.1], "at least two, each once"),
        (("arms", "rotated", "rates"), [0.1, -1], "a list of numbers above 0"),
        (("arms", "rotated", "rates"), [0.1, 0.2], "tuning: arms have rates, and no seeds"),
        (("quick", "evals"), 0, "quick.evals is 0"),
        (("curves",), {"a b": {"of": "", "arms": ["adam"]}}, "'a b': letters, digits and _ alone"),
        (("curves",), {"a": {"of": "", "arms": ["eve"]}}, "curves.a: no arm 'eve': there is adam"),
        (("claims",), [], "at least one claim"),
        (("claims", 1, "name"), "better", "claim 'better' is there twice"),
        (("claims", 1, "waits_for"), None, r"claim 2 \(later\): either parts, or a list"),
        (("claims", 0, "waits_for"), ["x"], r"claim 1 \(better\): either parts, or a list"),
        ((*PART, "low"), ["adams"], "no arm 'adams': there is adam, rotated"),
        ((*PART, "low"), [], "low is a list of arms"),
        ((*PART, "low"), ["adam", "rotated"], "as many arms in low as in high"),
        ((*PART, "high"), None, "high, or than is a number"),
        ((*PART, "than"), 3, "high, or than is a number"),
        ((*PART, "statistic"), "speed", "statistic 'speed': there is loss"),
        ((*PART, "rule"), "more", "rule 'more': there is less, noninferior, equivalent"),
        ((*PART, "rule"), "noninferior", "margin is 0.0: above 0"),
        ((*PART, "margin"), 0.1, "margin is 0.1: above 0, and none for the rule less"),
    ],
)
def test_mistakes_are_named(tmp_path, keys, value, words):
    path = write(tmp_path / "mine.json", *keys, value=value)
    with pytest.raises(UserError, match=words) as caught:
        file.read(path)
    assert "\n" not in str(caught.value)
    if keys != ("mini", "seeds"):
        with pytest.raises(UserError, match=words):
            study.lay_out(ROOT, str(path), study.Options())


def test_the_committed_file_lays_out(tmp_path):
    declared = file.read(study.find("claims"))
    made = study.lay_out(ROOT, "claims", study.Options(out=str(tmp_path)))
    assert len(made.jobs) == len(declared.arms) * len(plan.WORKLOADS) * len(declared.seeds)
    points = {job.run.hparams["learning_rate"] for job in made.jobs}
    assert points == {0.002, 0.004, 0.008}
