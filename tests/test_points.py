"""The declaration of fields: checks, hints, docs, and that what passes really trains."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from algoperf_shampoo import points
from algoperf_shampoo.harness import hparams, submission_loader
from algoperf_shampoo.optim import Solver

ROOT = Path(__file__).parents[1]
VARIANTS = submission_loader.variants(ROOT)
FIELDS = {name: submission_loader.fields(ROOT, name) for name in VARIANTS}
sys.path.insert(0, str(ROOT / "scripts"))


def point_of(variant: str) -> dict[str, Any]:
    [point] = json.loads((ROOT / "search_spaces" / f"{variant}.json").read_text())
    return point


def module(variant: str) -> Any:
    path = ROOT / "submissions" / variant / "submission.py"
    spec = importlib.util.spec_from_file_location(f"points_{variant}", path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def steps(variant: str, point: dict[str, Any], number: int = 3) -> list[torch.Tensor]:
    """A tiny model trained by the variant's own functions; its parameters."""
    submission = module(variant)
    hyperparameters = hparams.as_namedtuple(point)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2))
    batch = {"inputs": torch.randn(16, 9), "targets": torch.randn(16, 2)}

    def model_fn(
        params, augmented_and_preprocessed_input_batch, model_state, mode, rng, update_batch_norm,
        dropout_rate=0.1,
    ):  # fmt: skip
        return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def loss_fn(label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        loss = (logits_batch - label_batch).square().mean(1)
        return {"summed": loss.sum(), "n_valid_examples": torch.tensor(len(loss))}

    workload = types.SimpleNamespace(step_hint=50, model_fn=model_fn, loss_fn=loss_fn)
    state = submission.init_optimizer_state(workload, model, None, hyperparameters, None)
    for step in range(number):
        state, model, _ = submission.update_params(
            workload=workload,
            current_param_container=model,
            current_params_types=None,
            model_state=None,
            hyperparameters=hyperparameters,
            batch=batch,
            loss_type=None,
            optimizer_state=state,
            eval_results=[],
            global_step=step,
            rng=None,
        )
    return [p.detach() for p in model.parameters()]


def ends(field: points.Field) -> list[Any]:
    """Values at the borders of what a field takes."""
    kind = field.kind
    if isinstance(kind, points.Switch):
        return [True, False]
    if isinstance(kind, points.Choice):
        return list(kind.words)
    low = kind.low if not kind.low_open else kind.low + 1e-12
    return [low, kind.high if not kind.high_open else kind.high - 1e-9, *([1] * kind.integer)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_passes_the_check_takes_steps(variant):
    """Every field at each of its ends, the others as in the paper's point."""
    for field in points.fields(FIELDS[variant]):
        for value in ends(field):
            point = {**point_of(variant), field.name: value}
            if field.name != "precondition_frequency" and "precondition_frequency" in point:
                point["precondition_frequency"] = 2
            try:
                points.check(point, FIELDS[variant])
            except points.PointError as error:
                assert " times " in str(error) or "roots" in str(error) or value == 1
                continue
            with torch.random.fork_rng():
                after = steps(variant, point)
            assert all(p.isfinite().all() for p in after) or field.name == "learning_rate", point


def test_random_points_that_pass_take_steps():
    """Several fields at their ends or between them at once."""
    generator = random.Random(1)
    tried = 0
    for variant in itertools.islice(itertools.cycle(VARIANTS), 200):
        point = point_of(variant)
        own = points.fields(FIELDS[variant])
        for field in generator.sample(own, 4):
            low, high = (ends(field) * 2)[:2]
            between = isinstance(low, float) and generator.random() < 0.5
            point[field.name] = (
                low + (high - low) * generator.random() ** 9 if between else
                generator.choice([low, high])
            )  # fmt: skip
        try:
            points.check(point, FIELDS[variant])
        except points.PointError as error:
            assert " times " in str(error) or "roots" in str(error)
            continue
        if tried < 40:
            steps(variant, point)
            tried += 1
    assert tried == 40


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_nadam": "no"}, 'use_nadam is "no": it must be true or false'),
        ({"use_nadam": 1}, "use_nadam is 1"),
        ({"use_nadam": None}, "use_nadam is null"),
        ({"dropout_rate": ...}, "dropout_rate is missing: a number at least 0 and below 1"),
        ({"one_dim": "half"}, 'one_dim is "half": it must be "full" or "adam"'),
        ({"class": 1}, '"class" is no field'),
        ({"learning rate": 1}, '"learning rate" is no field .*did you mean learning_rate'),
        ({"matmul_precison": "high"}, "did you mean matmul_precision"),
        ({"beta1": 0.1}, "did you mean one_minus_beta1"),
        ({"trace_scale": "paper"}, "trace_scale is a field that this variant does not read"),
        ({"learning_rate": 1e308}, "learning_rate is 1e.308: .* at most 1000"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": True}, "learning_rate is true"),
        ({"learning_rate": 5e-324}, "learning_rate is 5e-324"),
        ({"learning_rate": float("nan")}, "learning_rate is NaN"),
        ({"learning_rate": 10**400}, "learning_rate is an integer of more than 40 digits"),
        ({"precondition_frequency": 10**400}, "an integer of more than 40 digits"),
        ({"precondition_frequency": 2.0}, "precondition_frequency is 2.0: .* an integer of"),
        ({"precondition_frequency": True}, "precondition_frequency is true"),
        ({"one_minus_beta2": 1e-17}, "one_minus_beta2 is 1e-17"),
        ({"one_minus_beta1": 1e-9}, "one_minus_beta1 is 1e-09"),
        ({"epsilon": 0}, "epsilon is 0"),
        ({"tau": 1}, "tau is 1"),
        ({"tau": [0.1]}, "tau is .0.1."),
        ({"tau": {"a": "\ud800\x1b"}}, "tau is"),
        ({"learning_rate": 1e3, "weight_decay": 1e3}, "1000.0 times weight_decay 1000.0 is 1e.06"),
    ],
)
def test_bad_points_are_named_in_one_line_of_text(changes, named):
    point = {**point_of("eshampoo_adaptive"), **changes}
    point = {k: v for k, v in point.items() if v is not ...}
    with pytest.raises(points.PointError, match=named) as raised:
        points.check(point, FIELDS["eshampoo_adaptive"])
    message = str(raised.value)
    assert message.isascii() and message.isprintable() and len(message) < 300


def test_fields_that_fail_together():
    point = {**point_of("shampoo_grafting"), "epsilon": 1e-20}
    assert points.check(point, FIELDS["shampoo_grafting"])["epsilon"] == 1e-20
    with pytest.raises(points.PointError, match="epsilon 1e-20 with exponent_multiplier 5.0"):
        points.check({**point, "exponent_multiplier": 5.0}, FIELDS["shampoo_grafting"])


def test_a_bad_point_is_one_value_error_of_init_optimizer_state():
    point = {**point_of("nadamw"), "use_nadam": "no"}
    with pytest.raises(ValueError, match='^use_nadam is "no": it must be true or false$'):
        steps("nadamw", point)


def test_defaults_are_the_optimizers_own():
    point = points.check(point_of("eshampoo_fixed"), FIELDS["eshampoo_fixed"])
    solver = Solver()
    assert point["eigensolver"] == solver.method
    assert point["eigen_workspace_mib"] == solver.workspace_mib


def test_the_documented_table_is_the_declared_one():
    import fields as script

    text = (ROOT / "docs" / "points.md").read_text()
    assert script.with_table(text, script.table(ROOT)) == text, "python scripts/fields.py --write"
    for field in points.DECLARED:
        assert f"| `{field.name}` | {field.kind} |" in text


def test_declarations_are_whole_and_every_field_is_read():
    names = [field.name for field in points.DECLARED]
    shorts = [field.short for field in points.DECLARED]
    assert len(set(names)) == len(names) and len(set(shorts)) == len(shorts)
    read = {field.name for own in FIELDS.values() for field in points.fields(own)}
    assert read == set(names)
    groups = {group for some in points.GROUPS.values() for group in some}
    for field in points.DECLARED:
        assert field.meaning and field.group in (None, *groups)
        assert field.default is points.REQUIRED or field.kind.accepts(field.default)
    for space in sorted((ROOT / "search_spaces").rglob("*.json")):
        for workload in ("fastmri", "imagenet_vit", "ogbg"):
            assert hparams.read_points(space, 1, FIELDS[space.stem], workload)
