"""Queues repeat and skip to the bit, splits do not leak, broken data is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from algoperf_shampoo import workloads
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.workloads import fastmri
from algoperf_shampoo.workloads.data import SHIPPED, read_arrays
from algoperf_shampoo.workloads.ogbg import GraphStore
from algoperf_shampoo.workloads.queues import TrainQueue

MINIS = ["fastmri_mini", "imagenet_vit_mini", "ogbg_mini"]
RNG = np.array([3, 4], np.uint32)


def flat(batch: dict[str, Any]) -> list[torch.Tensor]:
    out: list[torch.Tensor] = []
    for value in batch.values():
        out.extend(
            [value] if isinstance(value, torch.Tensor) else [v for v in value if v is not None]
        )
    return out


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def arrays(name: str) -> dict[str, np.ndarray]:
    data = workloads.load(name).config.data
    assert data is not None
    return read_arrays(None, data["file"], data["sha256"])


@pytest.mark.parametrize("name", MINIS)
def test_batch_t_is_a_function_of_rng_and_t(name: str) -> None:
    workload = workloads.load(name)
    straight = workload._build_input_queue(RNG, "train", None, 5)
    batches = [next(straight) for _ in range(5)]
    skipped = workload._build_input_queue(RNG, "train", None, 5)
    skipped.skip(2)  # type: ignore[attr-defined]
    next(skipped)
    skipped.skip(1)  # type: ignore[attr-defined]
    assert same(next(skipped), batches[4])
    other = workload._build_input_queue(RNG + 1, "train", None, 5)
    assert not same(next(other), batches[0])


def test_every_epoch_is_a_permutation() -> None:
    queue = TrainQueue(10, 4, RNG, lambda indices, t: {"indices": indices, "t": t})
    seen = np.concatenate([next(queue)["indices"] for _ in range(10)])
    epochs = seen.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert len(TrainQueue(3, 8, RNG, lambda i, t: {"i": i}).indices(0)) == 8


@pytest.mark.parametrize("name", MINIS)
def test_eval_queues_cover_the_split_once(name: str) -> None:
    workload = workloads.load(name)
    for split in ("eval_train", "validation", "test"):
        batches = list(workload._build_input_queue(RNG, split, None, 400))
        assert sum(len(b["targets"]) for b in batches) == getattr(workload, f"num_{split}_examples")
        again = workload._build_input_queue(RNG + 9, split, None, 400, num_batches=1)
        assert [same(b, batches[0]) for b in again] == [True]
    with pytest.raises(UserError, match="unknown split 'dev'"):
        workload._build_input_queue(RNG, "dev", None, 4)


@pytest.mark.parametrize("name", ["fastmri", "imagenet_vit", "ogbg"])
def test_full_size_has_no_data_pipeline_here(name: str) -> None:
    with pytest.raises(UserError, match="HARNESS=algoperf"):
        workloads.load(name)._build_input_queue(RNG, "train", None, 4)


@pytest.mark.parametrize("name", MINIS)
def test_training_twice_gives_the_same_bits(name: str) -> None:
    def train() -> list[torch.Tensor]:
        workload = workloads.load(name)
        model, _ = workload.init_model_fn(RNG)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        queue = workload._build_input_queue(RNG, "train", None, 8)
        for _ in range(3):
            batch = next(queue)
            mode = workloads.ForwardPassMode.TRAIN
            logits, _ = workload.model_fn(model, batch, None, mode, RNG, False)
            optimizer.zero_grad()
            workload.loss_fn(batch["targets"], logits, batch.get("weights"))["summed"].backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(train(), train(), strict=True))


def test_eval_model_has_algoperfs_keys() -> None:
    workload = workloads.load("ogbg_mini")
    model, _ = workload.init_model_fn(RNG)
    found = workload.eval_model(1024, model, None, RNG, None, None, 0)
    metric = "mean_average_precision"
    assert set(found) == {
        *(
            f"{split}/{key}"
            for split in ("train", "validation", "test")
            for key in (metric, "loss")
        ),
        "validation/num_examples",
        "test/num_examples",
    }
    assert 0 < found[f"validation/{metric}"] < 1
    # Batches of another size give the same metric.
    again = workload.eval_model(400, model, None, RNG, None, None, 0)
    assert again[f"test/{metric}"] == pytest.approx(found[f"test/{metric}"], rel=1e-4)


def test_no_molecule_is_in_two_splits() -> None:
    found = arrays("ogbg_mini")
    keys, splits = found["molecule_keys"], found["splits"]
    members = [set(keys[splits == s].tolist()) for s in range(3)]
    assert not (members[0] & members[1] or members[0] & members[2] or members[1] & members[2])
    # A label never contradicts a stereoisomer's.
    order = np.argsort(keys, kind="stable")
    twins = keys[order][1:] == keys[order][:-1]
    a, b = found["labels"][order][1:][twins], found["labels"][order][:-1][twins]
    assert twins.any() and not np.any((a + b == 1) & (a >= 0) & (b >= 0))


def test_every_ogbg_task_has_both_classes_in_every_split() -> None:
    found = arrays("ogbg_mini")
    for split in range(3):
        labels = found["labels"][found["splits"] == split]
        assert ((labels == 0).any(axis=0) & (labels == 1).any(axis=0)).all()


def test_heads_and_images_differ_between_splits() -> None:
    heads = arrays("fastmri_mini")
    assert len(set(heads["heads"].tolist())) == 3
    for found in (heads, arrays("imagenet_vit_mini")):
        rows = [
            {image.tobytes() for image in found[f"{s}_images"]}
            for s in ("train", "validation", "test")
        ]
        # Fashion-MNIST itself holds a few pictures twice.
        overlaps = (len(rows[0] & rows[1]), len(rows[0] & rows[2]), len(rows[1] & rows[2]))
        assert max(overlaps) <= (0 if found is heads else 3)


def test_molecules_have_their_bonds() -> None:
    batch = next(iter(workloads.load("ogbg_mini")._build_input_queue(RNG, "validation", None, 300)))
    graph = batch["inputs"]
    degrees = torch.bincount(graph.receivers, minlength=len(graph.nodes))
    # Features 2 and 4 are OGB's total degree and number of hydrogens.
    assert torch.equal(degrees, (graph.nodes[:, 2] - graph.nodes[:, 4]).long())
    owner = torch.arange(300).repeat_interleave(graph.n_node)
    assert torch.equal(owner[graph.senders], owner[graph.receivers])
    assert torch.equal(owner[graph.senders], torch.arange(300).repeat_interleave(graph.n_edge))


def test_graph_store_by_hand() -> None:
    store = GraphStore.from_bonds(
        nodes=torch.arange(5).view(5, 1),
        bonds=torch.tensor([[7], [8], [9]]),
        ends=torch.tensor([[0, 1], [0, 1], [1, 2]]),
        n_node=torch.tensor([2, 3]),
        n_bond=torch.tensor([1, 2]),
    )
    graph = store.batch(torch.tensor([1, 0]))
    assert graph.nodes.flatten().tolist() == [2, 3, 4, 0, 1]
    assert graph.edges.flatten().tolist() == [8, 9, 8, 9, 7, 7]
    assert graph.senders.tolist() == [0, 1, 1, 2, 3, 4]
    assert graph.receivers.tolist() == [1, 2, 0, 1, 4, 3]
    assert graph.n_node.tolist() == [3, 2] and graph.n_edge.tolist() == [4, 2]


def test_sampling_masks_keep_the_centre_and_a_quarter() -> None:
    masks = fastmri.sampling_masks(2000, 128, RNG)
    assert masks[:, 59:69].all()  # int(0.08 * 128) = 10 columns
    assert masks.mean().item() == pytest.approx(0.25, abs=0.005)


def test_fully_sampled_examples_reproduce_the_image() -> None:
    images = torch.rand(2, 16, 16) + 0.5
    found = fastmri.make_examples(images, torch.ones(2), torch.ones(1, 16), 8)
    torch.testing.assert_close(found["inputs"], found["targets"], atol=1e-4, rtol=1e-4)
    restored = found["targets"] * found["std"].view(-1, 1, 1) + found["mean"].view(-1, 1, 1)
    torch.testing.assert_close(restored, images[:, 4:12, 4:12])
    inputs = found["inputs"]
    torch.testing.assert_close(inputs.mean(dim=(1, 2)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(inputs.std(dim=(1, 2), correction=0), torch.ones(2))


def test_zero_filled_input_is_a_floor_with_room_above() -> None:
    workload = workloads.load("fastmri_mini")
    batch = next(iter(workload._build_input_queue(RNG, "validation", None, 105)))
    keys = ("inputs", "targets", "mean", "std", "volume_max")
    ssim = fastmri.metrics.ssim(*(batch[key] for key in keys)).mean().item()
    assert ssim == pytest.approx(0.625, abs=0.005)


def test_missing_and_corrupt_data_are_named(tmp_path: Path) -> None:
    workload = workloads.load("ogbg_mini")
    with pytest.raises(UserError, match="ogbg_mini.npz: mini data not found; .*data/mini.py"):
        workload._build_input_queue(RNG, "train", tmp_path, 4)
    raw = bytearray((SHIPPED / "ogbg_mini.npz").read_bytes())
    raw[1000] ^= 1
    (tmp_path / "ogbg_mini.npz").write_bytes(raw)
    with pytest.raises(UserError, match="ogbg_mini.npz: sha256 is .*, expected .*"):
        workload._build_input_queue(RNG, "train", tmp_path, 4)


def test_shipped_data_is_small() -> None:
    assert sum(f.stat().st_size for f in SHIPPED.iterdir()) < 15_000_000
