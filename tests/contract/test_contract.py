"""Our submissions against AlgoPerf's contract, recorded from its own code (``record.py``)."""

from __future__ import annotations

import importlib.util
import inspect
import io
import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

from algoperf_shampoo import workloads
from algoperf_shampoo.harness import hparams, submission_loader
from algoperf_shampoo.harness.algoperf import env
from tests.contract import record

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = json.loads(record.PATH.read_text(encoding="utf-8"))
VARIANTS = submission_loader.variants(ROOT)
KINDS = {kind.name: kind for kind in inspect._ParameterKind}


def module(variant: str) -> Any:
    path = ROOT / "submissions" / variant / "submission.py"
    spec = importlib.util.spec_from_file_location(f"contract_{variant}", path)
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def signature(recorded: list[dict[str, Any]]) -> inspect.Signature:
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [
            inspect.Parameter(p["name"], KINDS[p["kind"]], default=empty if p["required"] else None)
            for p in recorded
        ]
    )


class StrictWorkload:
    """A tiny regression whose functions take exactly what AlgoPerf's workload's take."""

    step_hint = 50
    metrics_logger = None

    def __init__(self, name: str) -> None:
        recorded = CONTRACT["workloads"][name]
        self._model_fn = signature(recorded["model_fn"])
        self._loss_fn = signature(recorded["loss_fn"])
        self.seen: dict[str, Any] = {}
        self.model_fn = self._bound(self._model_fn, self._forward)
        self.loss_fn = self._bound(self._loss_fn, self._loss)

    def _bound(self, own: inspect.Signature, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(own.bind(*args, **kwargs).arguments)

        call.__signature__ = own  # type: ignore[attr-defined]
        return call

    def _forward(self, given: dict[str, Any]) -> Any:
        assert given["mode"].name == "TRAIN"
        self.seen["dropout_rate"] = given.get("dropout_rate", "absent")
        return given["params"](given["augmented_and_preprocessed_input_batch"]["inputs"]), None

    def _loss(self, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        per_example = (given["logits_batch"] - given["label_batch"]).square().mean(1)
        count = torch.tensor(len(per_example))
        return {"summed": per_example.sum(), "n_valid_examples": count, "per_example": per_example}


def batches() -> Any:
    generator = torch.Generator().manual_seed(3)
    teacher = torch.randn(6, 4, generator=generator)
    while True:
        inputs = torch.randn(16, 6, generator=generator)
        yield {"inputs": inputs, "targets": inputs @ teacher}


def start(variant: str, workload: StrictWorkload) -> tuple[Any, Any, Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    fields = submission_loader.fields(ROOT, variant)
    point = hparams.read_points(ROOT / "search_spaces" / f"{variant}.json", 1, fields)[0]
    if "precondition_frequency" in point:
        point["precondition_frequency"] = 2
    point = hparams.as_namedtuple(point)
    submission = module(variant)
    names = ["workload", "model_params", "model_state", "hyperparameters", "opt_init_rng"]
    assert CONTRACT["calls"]["init_optimizer_state"]["positions"] == names
    state = submission.init_optimizer_state(workload, model, None, point, None)
    return submission, model, point, state


def train(run: tuple, workload: StrictWorkload, queue: Any, steps: range) -> Any:
    """The runner's loop, its calls as recorded."""
    submission, model, point, state = run
    for step in steps:
        values = {
            "workload": workload,
            "current_param_container": model,
            "current_params_types": None,
            "model_state": None,
            "hyperparameters": point,
            "loss_type": None,
            "optimizer_state": state,
            "eval_results": [],
            "global_step": step,
            "rng": None,
        }
        known = {"input_queue": queue, "model_params": model, "data_select_rng": None, **values}
        positions = CONTRACT["calls"]["data_selection"]["positions"]
        values["batch"] = submission.data_selection(*(known[name] for name in positions))
        keywords = {name: values[name] for name in CONTRACT["calls"]["update_params"]["keywords"]}
        if "train_state" in inspect.signature(submission.update_params).parameters:
            keywords["train_state"] = MappingProxyType({"accumulated_submission_time": 0.0})
        state, model, _ = submission.update_params(**keywords)
        names = CONTRACT["calls"]["prepare_for_eval"]["keywords"]
        keywords = {name: values[name] for name in names}
        state, model, _ = submission.prepare_for_eval(**keywords)
    return state, model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", record.FUNCTIONS)
def test_functions_have_the_arguments_of_the_api(variant: str, name: str) -> None:
    wanted = [p["name"] for p in CONTRACT["signatures"][name]]
    offered = list(inspect.signature(getattr(module(variant), name)).parameters)
    assert offered == wanted or offered == [n for n in wanted if n != "train_state"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("workload", ["fastmri", "imagenet_vit", "ogbg"])
def test_trains_under_the_recorded_calls(variant: str, workload: str) -> None:
    strict = StrictWorkload(workload)
    run = start(variant, strict)
    before = [p.detach().clone() for p in run[1].parameters()]
    train(run, strict, batches(), range(4))
    assert all(not torch.equal(b, p) for b, p in zip(before, run[1].parameters(), strict=True))
    # Not left to the workload's default, which is 0.1 on OGBG.
    assert strict.seen["dropout_rate"] == run[2].dropout_rate == 0.0


@pytest.mark.parametrize("variant", VARIANTS)
def test_survives_the_runners_checkpoint(variant: str) -> None:
    """Save and restore as checkpoint_utils does: every entry by state_dict, weights only."""
    workload = StrictWorkload("fastmri")
    whole = start(variant, workload)
    train(whole, workload, batches(), range(8))

    first = start(variant, workload)
    queue = batches()
    train(first, workload, queue, range(5))
    buffer = io.BytesIO()
    entries = {name: entry.state_dict() for name, entry in first[3].items()}
    torch.save({"model": first[1].state_dict(), "optimizer_state": entries}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, map_location="cpu")

    second = start(variant, workload)
    second[1].load_state_dict(saved["model"])
    assert set(second[3]) == set(saved["optimizer_state"])
    for name, entry in second[3].items():
        entry.load_state_dict(saved["optimizer_state"][name])
    train(second, workload, queue, range(5, 8))
    for a, b in zip(whole[1].parameters(), second[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_sizes_are_those_of_the_workloads(variant: str) -> None:
    loaded = module(variant)
    sizes = {name: loaded.get_batch_size(name) for name in ("fastmri", "imagenet_vit", "ogbg")}
    assert sizes == {"fastmri": 32, "imagenet_vit": 1024, "ogbg": 512}
    with pytest.raises(ValueError):  # the runner then asks for the base workload's
        loaded.get_batch_size("fastmri_tanh")


@pytest.mark.parametrize("name", ["fastmri", "imagenet_vit", "ogbg"])
def test_workloads_config_has_the_benchmarks_constants(name: str) -> None:
    ours = workloads.load(name)
    recorded = dict(CONTRACT["workloads"][name]["constants"])
    assert ours.target_metric_name == recorded.pop("target_metric_name")
    shared = {constant: value for constant, value in recorded.items() if hasattr(ours, constant)}
    assert len(shared) >= 9
    assert {constant: getattr(ours, constant) for constant in shared} == pytest.approx(shared)


def test_one_commit_everywhere() -> None:
    assert CONTRACT["algoperf_commit"] == env.COMMIT
    for file in ("pyproject.toml", "requirements-algoperf-no-deps.txt"):
        assert f"algorithmic-efficiency.git@{env.COMMIT}" in (ROOT / file).read_text().replace(
            "algorithmic-efficiency@", "algorithmic-efficiency.git@"
        )


def test_recorded_contract_is_that_of_the_installed_algoperf() -> None:
    pytest.importorskip("algoperf", reason="AlgoPerf is not installed: the record stands for it")
    assert record.describe() == CONTRACT
