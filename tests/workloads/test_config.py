"""Mistakes in a workload file are reported with file, key and value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from algoperf_shampoo import workloads
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.workloads.config import DEFAULT_DIR


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEFAULT_DIR, tmp_path / "workloads_config"))


def edit(folder: Path, name: str, path: str, value: Any) -> None:
    """Sets a key, or deletes it when the value is ``...``."""
    file = folder / f"{name}.json"
    config = json.loads(file.read_text())
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[key]
    else:
        node[key] = value
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("fastmri", "mini.max_steps", "500", r"mini.max_steps is '500'; .*positive whole number"),
        (
            "fastmri",
            "mini.max_steps",
            0,
            r"mini.max_steps is 0; it must be a positive whole number",
        ),
        ("fastmri", "mini.max_steps", True, r"mini.max_steps is True"),
        ("fastmri", "mini.max_step", 5, r"unknown key mini.max_step \(value 5\); known here: "),
        ("fastmri", "mini.data.sha256", ..., r"key mini.data.sha256 is missing"),
        ("fastmri", "full.step_hint", 1, r"unknown key full.step_hint \(value 1\)"),
        ("fastmri", "workload", "ogbg", r"workload is 'ogbg'; it must be 'fastmri'"),
        ("fastmri", "mini.data.crop", 8, r"mini.model.num_pool_layers is 3; too many"),
        ("imagenet_vit", "mini.model.num_heads", 7, r"mini.model.num_heads is 7; it must divide"),
        ("imagenet_vit", "mini.model.patch_size", 5, r"mini.model.patch_size is 5; it must divide"),
        ("imagenet_vit", "mini.model.width", 6, r"mini.model.num_heads|mini.model.width"),
        ("imagenet_vit", "mini.validation_target_value", 78, r"validation_target_value is 78.0"),
        (
            "ogbg",
            "mini.model.hidden_dims",
            [],
            r"mini.model.hidden_dims is \[\]; it must be a list",
        ),
        ("ogbg", "mini.model.hidden_dims", [4, "8"], r"mini.model.hidden_dims\[1\] is '8'"),
        ("ogbg", "full.eval_batch_size", None, r"full.eval_batch_size is None"),
    ],
)
def test_mistakes_are_named(folder: Path, name: str, path: str, value: Any, message: str) -> None:
    edit(folder, name, path, value)
    with pytest.raises(UserError, match=rf"{name}\.json: .*{message}") as caught:
        workloads.load(f"{name}_mini", folder)
    assert "\n" not in str(caught.value)


def test_missing_and_malformed_files(folder: Path) -> None:
    (folder / "ogbg.json").unlink()
    with pytest.raises(UserError, match=r"ogbg.json: no such workload file"):
        workloads.load("ogbg", folder)
    (folder / "ogbg.json").write_text("{")
    with pytest.raises(UserError, match=r"ogbg.json: not valid JSON"):
        workloads.load("ogbg", folder)
    (folder / "ogbg.json").write_text("[]")
    with pytest.raises(UserError, match=r"ogbg.json: the file is \[\]; it must be an object"):
        workloads.load("ogbg", folder)


def test_counts_are_checked_against_the_data(folder: Path) -> None:
    edit(folder, "fastmri", "mini.num_train_examples", 7)
    workload = workloads.load("fastmri_mini", folder)
    with pytest.raises(UserError, match=r"mini.num_train_examples is 7; the data has 536"):
        workload._build_input_queue([1, 2], "train", None, 4)


def test_unknown_workload() -> None:
    with pytest.raises(UserError, match=r"unknown workload 'fastmr' \(did you mean fastmri\?\)"):
        workloads.load("fastmr")


def test_versions() -> None:
    assert workloads.load("fastmri").step_hint == 18_094
    assert workloads.load("fastmri", version="v0.5").step_hint == 36_189
    assert workloads.load("fastmri", version="2026").eval_period_time_sec == 110
    with pytest.raises(UserError, match=r"AlgoPerf version 'v9': there is v0.5, v0.6, 2026"):
        workloads.load("fastmri", version="v9")


@pytest.mark.parametrize("name", workloads.names())
def test_shipped_configurations(name: str) -> None:
    workload = workloads.load(name)
    assert workload.name == name
    if workload.is_mini:
        assert workload.max_steps is not None and workload.eval_period_steps is not None
        assert workload.step_hint == workload.max_steps  # the schedule ends with the budget
        assert workload.max_steps % workload.eval_period_steps == 0
    else:
        assert workload.max_steps is None and workload.eval_period_steps is None
