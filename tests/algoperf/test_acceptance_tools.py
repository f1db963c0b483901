"""The tools of the acceptance runs say what is wrong, and leave no variant out."""

from __future__ import annotations

import argparse
import doctest
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import submission_loader
from algoperf_shampoo.optim.soap import SOAP
from tests.algoperf import (
    acceptance,
    acceptance_table,
    all_acceptance,
    instrumented_runner,
    kill_acceptance,
    provenance,
)

ROOT = Path(__file__).resolve().parents[2]
GOOD: dict[str, Any] = {
    "commit": "c",
    "uncommitted": [],
    "exit_codes": {"two": 0, "two_killed": 1, "two_resumed": 0, "one_killed": -9},
    "steps_seen": {"two": 32},
    "resumed_from_step": {"two_resumed": 12.0},
    "all_finite": True,
    "replicas_equal_at_every_step": {"two": True},
    "ends_as_the_unbroken_run_bitwise": {"two_resumed": True},
    "eigenbasis": [
        {"global_step": step, "eigenbasis_refreshes": 6.0, "eigenbasis_failures": 0.0}
        for step in (12.0, 32.0)
    ],
}
HARM: list[tuple[str, Any, str]] = [
    ("commit", "b", "the sources changed while it ran"),
    ("uncommitted", [" M optim/soap.py"], "the sources changed while it ran"),
    ("exit_codes", {"two": 0, "two_killed": 0}, "two_killed: exit code 0"),
    ("exit_codes", {"two": 1}, "two: exit code 1"),
    ("steps_seen", {"two": 31}, "two: 31 steps of 32"),
    ("resumed_from_step", {"one": 1.0}, "one: resumed from step 1, not 12"),
    ("all_finite", False, "losses that are not finite"),
    ("replicas_equal_at_every_step", {"two": False}, "two: replicas differ"),
    ("ends_as_the_unbroken_run_bitwise", {"one_resumed": False}, "one_resumed: not the unbroken"),
    ("eigenbasis", GOOD["eigenbasis"][1:], "no refresh by step 12"),
    ("eigenbasis", [{**row, "eigenbasis_failures": 1.0} for row in GOOD["eigenbasis"]], "failed"),
]


@pytest.fixture(autouse=True)
def same_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are as GOOD says, whatever else is going on in the tree."""
    monkeypatch.setattr(provenance, "sources", lambda: {"commit": "c", "uncommitted": []})


def case(point: dict[str, Any]) -> Any:
    args = argparse.Namespace(steps=32)
    return SimpleNamespace(args=args, saved_after=12, point=point)


def test_a_good_case_has_nothing_wrong_and_each_harm_is_named() -> None:
    made = case({"precondition_frequency": 5})
    assert acceptance.wrong(made, GOOD) == []
    for name, value, line in HARM:
        (found,) = acceptance.wrong(made, {**GOOD, name: value})
        assert line in found
    assert acceptance.wrong(case({}), {**GOOD, "eigenbasis": []}) == []


def test_every_variant_is_tried_under_algoperfs_runner() -> None:
    old = set(all_acceptance.OLD.removeprefix("--variants=").split(","))
    newer = [name for names in all_acceptance.OURS.values() for name in names.split(",")]
    assert len(newer) == len(set(newer)) and not old & set(newer)
    assert old | set(newer) == set(submission_loader.variants(ROOT))
    shared = [name for names in all_acceptance.SHARED.values() for name in names.split(",")]
    assert len(shared) == len(set(shared))
    assert set(shared) == {v for v in submission_loader.variants(ROOT) if has_factors(v)}
    assert len(all_acceptance.PARTS["sharded"]) == 1 + len(all_acceptance.SHARED)


def has_factors(variant: str) -> bool:
    (point,) = json.loads((ROOT / "search_spaces" / f"{variant}.json").read_text())
    return "max_preconditioner_dim" in point


@pytest.mark.parametrize(
    ("sharding", "kept", "good"),
    [
        ("on", [[4, 6], [2, 6]], True),
        ("on", [[6, 6], [6, 6]], False),  # not shared
        ("on", [[6, 6], [0, 6]], False),
        ("on", [[4, 6], [1, 6]], False),
        ("on", [None, None], False),
        ("off", [[6, 6], [6, 6]], True),
        ("off", [[4, 6], [2, 6]], False),
        ("auto", [[4, 6], [2, 6]], True),
        ("auto", [[6, 6], [6, 6]], True),
        ("auto", [[6, 6], [5, 6]], False),
        ("auto", [None, None], True),
    ],
)
def test_a_record_whose_ranks_keep_other_factors_than_its_point_says_is_wrong(
    sharding: str, kept: list[Any], good: bool
) -> None:
    found = acceptance.wrong(case({"sharding": sharding}), {**GOOD, "factors_kept": {"two": kept}})
    assert found == ([] if good else [f"two: factors kept by the ranks, and all: {kept}"])


def test_the_recorder_counts_the_factors_that_a_rank_keeps() -> None:
    model = torch.nn.Linear(3, 5)
    optimizer = SOAP(model.parameters())
    optimizer.step()
    assert instrumented_runner.factors_kept(optimizer) == (2, 2)  # a vector of 15, one of 5
    assert instrumented_runner.factors_kept(torch.optim.AdamW(model.parameters())) is None


def test_parts_are_commands_of_tools_that_there_are(tmp_path: Path) -> None:
    assert all_acceptance.chosen("kills,cuts") == ["cuts", "kills"]
    assert all_acceptance.chosen("") == [*all_acceptance.PARTS]
    with pytest.raises(UserError, match="no part 'cut': there is cuts, kills"):
        all_acceptance.chosen("kills,cut")
    outs = []
    places = tmp_path / "data", tmp_path / "work", tmp_path / "out"
    for commands in all_acceptance.PARTS.values():
        for words in commands:
            whole = all_acceptance.command(words, *places)
            assert importlib.util.find_spec(whole[2]) is not None
            outs += [word for word in whole if word.startswith("--out=")]
            assert len([word for word in whole if word.startswith("--out=")]) == 1
    assert f"--out={tmp_path}/out/power_cuts.json" in outs and f"--out={tmp_path}/out" in outs


def test_records_name_no_place_of_a_machine() -> None:
    assert doctest.testmod(provenance).attempted and doctest.testmod(provenance).failed == 0
    spaced = ["kill_acceptance.py", "--work", "/x y", "--data=/z", "--ruleset", "self"]
    expected = "python -m tests.algoperf.kill_acceptance --work=WORK --data=DATA --ruleset self"
    assert provenance.command(spaced) == expected


def test_a_killed_run_is_the_command_of_a_user(tmp_path: Path) -> None:
    args = argparse.Namespace(variant="eshampoo_adaptive", ruleset="self", frequency="3")
    (tmp_path / "data").mkdir()
    words = kill_acceptance.submit_words(args, tmp_path / "data", tmp_path / "out", 7)
    assert words[0] == "make" and "submit-eshampoo-adaptive" in words
    assert {"PROCESSES=2", "RULESET=self", "STEPS=7", "F=3"} <= set(words)
    run = kill_acceptance.plan_of(args, tmp_path / "data", tmp_path / "out").runs[0]
    assert run.ruleset == "self" and run.hparams["precondition_frequency"] == 3
    assert run.run_dir.is_relative_to(tmp_path / "out")


def test_the_table_is_what_the_records_say() -> None:
    lines = acceptance_table.table()
    assert len(lines) > 8
    assert "\n".join(lines) in (acceptance_table.RECORDS / "README.md").read_text()
    for path in acceptance_table.RECORDS.glob("*.json"):
        assert acceptance_table.read(path).get("wrong", []) == [], path
