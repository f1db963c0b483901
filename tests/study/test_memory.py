"""Memory by formula, against the optimizer laid out on the shapes of AlgoPerf's own nine models."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from algoperf_shampoo import submission
from algoperf_shampoo.harness import hparams, submission_loader
from algoperf_shampoo.study import memory
from tests import test_points

ROOT = Path(__file__).parents[2]
NINE = (
    "criteo1tb fastmri finewebedu_lm imagenet_resnet imagenet_vit librispeech_conformer "
    "librispeech_deepspeech ogbg wmt"
).split()
# Of the three that have a model of ours as well, facts of AlgoPerf's: parameters, numbers.
KNOWN = {"fastmri": (24, 7756097), "imagenet_vit": (200, 22122472), "ogbg": (66, 3554176)}


def parameters(workload: str) -> list[torch.nn.Parameter]:
    """On the meta device, which has shapes and no memory."""
    return [
        torch.nn.Parameter(torch.empty(shape, device="meta"))
        for shape, count in memory.shapes(workload)
        for _ in range(count)
    ]


def test_the_shapes_are_of_all_nine_and_each_has_a_batch_size():
    assert sorted(memory.workloads()) == NINE
    for workload in NINE:
        batch = submission.Submission.get_batch_size(workload)
        assert batch % 8 == 0 and batch % 4 == 0
    for workload, (count, numbers) in KNOWN.items():
        found = memory.shapes(workload)
        assert sum(n for _, n in found) == count
        assert sum(math.prod(shape) * n for shape, n in found) == numbers


@pytest.mark.parametrize("workload", [name for name in NINE if name != "criteo1tb"])
@pytest.mark.parametrize("variant", submission_loader.variants(ROOT))
def test_the_formula_is_what_the_optimizer_allocates(variant, workload):
    point = test_points.point_of(variant)
    own = test_points.module(variant)
    complete = own._submission.point(hparams.as_namedtuple(point))
    optimizer = own.make_optimizer(parameters(workload), complete, None)
    entries = 0
    for group in optimizer._groups:
        for stack in group.layout.stacks:
            held = [stack.g, *stack.work, *stack.state.values(), *stack.factors, *stack.operators]
            held += [vector for mine in stack.vectors.values() for vector in mine]
            entries += sum(tensor.numel() for tensor in held)
    made = submission_loader.optimizer(ROOT, variant)
    assert made is not None and made.name == type(optimizer).__name__
    alone = {**point, "sharding": "off"}
    need = memory.need(memory.shapes(workload), alone, optimizer=made)
    workspace = complete._asdict().get("eigen_workspace_mib", 0) << 20
    assert need.optimizer == 4 * entries + workspace
    numbers = sum(p.numel() for p in optimizer.param_groups[0]["params"])
    assert need.model == 4 * 3 * numbers
    assert memory.need(memory.shapes(workload), point, processes=1).model == 4 * 2 * numbers
    assert memory.need(memory.shapes(workload), point, 1, made).optimizer == need.optimizer


def test_where_gpus_share_the_work_each_has_its_part_and_all_gradients():
    point = {**test_points.point_of("eshampoo_adaptive"), "eigen_workspace_mib": 8}
    shapes = [((1024, 1024), 4)]
    alone = memory.need(shapes, point, processes=1).optimizer - (8 << 20)
    block = 4 * 2**20  # bytes of a 1024 x 1024 matrix
    assert alone == 4 * 8 * block  # g, a buffer, M, D, two factors, two bases
    kept_by_others = 2 * 7 * block
    shared = memory.need(shapes, point, processes=2).optimizer
    assert shared == 4 * block + 2 * 7 * block + (8 << 20) + kept_by_others // 2


def test_what_does_not_fit_is_named():
    point = {**test_points.point_of("eshampoo_adaptive"), "sharding": "off"}
    [criteo, *others] = memory.preview(point)
    assert criteo.startswith("criteo1tb: 46.6 of 40 GiB a GPU besides activations")
    assert "does not fit: the state of 4 x [1048576, 128] alone is 40.5" in criteo
    assert len(others) == 8 and not any("does not fit" in line for line in others)
    adam = memory.preview(test_points.point_of("nadamw"))
    assert not any("does not fit" in line for line in adam)
    assert not any("does not fit" in line for line in memory.preview({**point, "sharding": "on"}))
    plain = {**point, "one_dim": "adam"}
    full = {**plain, "one_dim": "full"}
    without, with_factors = (memory.need([((999,), 2)], p).optimizer for p in (plain, full))
    assert with_factors - without == 4 * 2 * 2 * 999**2


def test_the_data_say_how_they_were_obtained():
    path = ROOT / "algoperf_shampoo" / "workloads" / "data" / "algoperf_shapes.json"
    record = json.loads(path.read_text())
    assert len(record["algoperf_commit"]) == 40 and "algoperf_shapes.py" in record["source"]


def test_a_preview_is_of_the_variant_s_own_rule():
    point = {**test_points.point_of("kl_shampoo"), "sharding": "off"}
    own = memory.preview(point, optimizer=submission_loader.optimizer(ROOT, "kl_shampoo"))
    assert own != memory.preview(point) and len(own) == 9


def test_a_variant_of_another_name_has_the_preview_of_its_class(tmp_path):
    """And one whose module calls no class of ours, or several, counts as EShampoo."""
    for name, edit in (
        ("mine", ("", "")),
        ("grafted", ("grafting=None", 'grafting="adam"')),
        ("several", ("    return Shampoo", "    Shampoo(params)\n    return Shampoo")),
    ):
        folder = tmp_path / "submissions" / name
        folder.mkdir(parents=True)
        text = (ROOT / "submissions/shampoo/submission.py").read_text()
        assert edit[0] in text
        (folder / "submission.py").write_text(text.replace(*edit))
    point = {**test_points.point_of("shampoo"), "sharding": "off"}
    lines = {
        name: memory.preview(point, optimizer=submission_loader.optimizer(tmp_path, name))
        for name in ("mine", "grafted", "several")
    }
    shampoo = submission_loader.optimizer(ROOT, "shampoo")
    assert lines["mine"] == memory.preview(point, optimizer=shampoo) != lines["grafted"]
    assert lines["grafted"] == lines["several"] == memory.preview(point)
