"""The full models have AlgoPerf's shapes and initial distributions, and compute what they say."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from algoperf_shampoo import workloads
from algoperf_shampoo.workloads import ForwardPassMode
from algoperf_shampoo.workloads.models import GNN, GraphsTuple, UNet, ViT
from algoperf_shampoo.workloads.models.layers import Chain, Dropout
from algoperf_shampoo.workloads.models.vit import sincos_positions

RNG = np.array([11, 22], np.uint32)

FASTMRI = Counter(
    {
        (1,): 1,
        (1, 32, 1, 1): 1,
        (32, 1, 3, 3): 1,
        (32, 32, 3, 3): 2,
        (32, 64, 3, 3): 1,
        (64, 32, 3, 3): 1,
        (64, 64, 3, 3): 2,
        (64, 128, 3, 3): 1,
        (128, 64, 3, 3): 1,
        (128, 128, 3, 3): 2,
        (128, 256, 3, 3): 1,
        (256, 128, 3, 3): 1,
        (256, 256, 3, 3): 2,
        (256, 512, 3, 3): 1,
        (512, 256, 3, 3): 1,
        (512, 512, 3, 3): 1,
        (64, 32, 2, 2): 1,
        (128, 64, 2, 2): 1,
        (256, 128, 2, 2): 1,
        (512, 256, 2, 2): 1,
    }
)
VIT = Counter(
    {
        (384,): 112,
        (1536,): 12,
        (1000,): 1,
        (384, 384): 49,
        (1536, 384): 12,
        (384, 1536): 12,
        (1000, 384): 1,
        (384, 3, 16, 16): 1,
    }
)
OGBG = Counter(
    {
        (256,): 47,
        (128,): 1,
        (256, 1024): 8,
        (256, 768): 4,
        (256, 896): 2,
        (256, 640): 1,
        (256, 9): 1,
        (256, 3): 1,
        (128, 256): 1,
    }
)


@pytest.mark.parametrize(
    ("name", "shapes", "total"),
    [
        ("fastmri", FASTMRI, 7_756_097),
        ("imagenet_vit", VIT, 22_122_472),
        ("ogbg", OGBG, 3_554_176),
    ],
)
def test_full_models_have_algoperfs_shapes(name: str, shapes: Counter, total: int) -> None:
    model, state = workloads.load(name).init_model_fn(RNG)
    found = Counter(tuple(p.shape) for p in model.parameters())
    assert state is None
    assert found == shapes
    assert sum(p.numel() for p in model.parameters()) == total
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("name", ["fastmri_mini", "imagenet_vit_mini", "ogbg_mini"])
def test_init_depends_on_rng_alone(name: str) -> None:
    workload = workloads.load(name)
    first, _ = workload.init_model_fn(RNG)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again, _ = workload.init_model_fn(RNG)
    other, _ = workload.init_model_fn(RNG + 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = list(zip(first.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = list(zip(first.parameters(), other.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_lecun_normal_in_unet_and_gnn() -> None:
    torch.manual_seed(0)
    weight = UNet(32, 2).conv.conv_layers[4].weight  # [128, 128, 3, 3]
    assert weight.std().item() == pytest.approx(1 / math.sqrt(128 * 9), rel=0.02)
    assert weight.abs().max() <= 2 / math.sqrt(128 * 9) / 0.8796
    gnn = GNN()
    assert gnn.decoder.weight.std().item() == pytest.approx(1 / math.sqrt(256), rel=0.02)
    assert not gnn.decoder.bias.any()


def test_vit_head_starts_at_zero() -> None:
    model = ViT(num_classes=7, patch_size=14, width=16, depth=1, mlp_dim=32, num_heads=2)
    x = torch.randn(3, 3, 28, 28)
    assert torch.equal(model(x), torch.zeros(3, 7))
    model(x).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()]
    assert len(silent) == len(list(model.parameters())) - 2  # all but the head's two


def test_sincos_positions_by_hand() -> None:
    found = sincos_positions(2, 3, 8, torch.device("cpu"))
    assert found.shape == (6, 8)
    y, x = 1, 2
    row = [math.sin(x), math.sin(x * 1e-4), math.cos(x), math.cos(x * 1e-4)]
    row += [math.sin(y), math.sin(y * 1e-4), math.cos(y), math.cos(y * 1e-4)]
    torch.testing.assert_close(found[y * 3 + x], torch.tensor(row))


def test_unet_pads_odd_sizes() -> None:
    assert UNet(4, 2)(torch.randn(2, 1, 21, 18)).shape == (2, 1, 21, 18)


def slow_gnn(model: GNN, graph: GraphsTuple) -> Tensor:
    """One graph of the batch at a time, loops over edges and nodes."""
    out, node0, edge0 = [], 0, 0
    for n, e in zip(graph.n_node.tolist(), graph.n_edge.tolist(), strict=True):
        nodes = list(model.node_embedder(graph.nodes[node0 : node0 + n]))
        edges = list(model.edge_embedder(graph.edges[edge0 : edge0 + e]))
        senders = (graph.senders[edge0 : edge0 + e] - node0).tolist()
        receivers = (graph.receivers[edge0 : edge0 + e] - node0).tolist()
        row = torch.zeros(model.num_outputs)
        for layer in model.graph_network:
            edges = [
                layer.update_edge_fn(torch.cat([edge, nodes[s], nodes[r], row]), 0.0)
                for edge, s, r in zip(edges, senders, receivers, strict=True)
            ]
            zero = torch.zeros_like(edges[0])
            sent = [
                sum((x for x, s in zip(edges, senders, strict=True) if s == i), zero)
                for i in range(n)
            ]
            got = [
                sum((x for x, r in zip(edges, receivers, strict=True) if r == i), zero)
                for i in range(n)
            ]
            nodes = [
                layer.update_node_fn(torch.cat([nodes[i], sent[i], got[i], row]), 0.0)
                for i in range(n)
            ]
            row = layer.update_global_fn(torch.cat([sum(nodes, zero), sum(edges, zero), row]), 0.0)
        out.append(model.decoder(row))
        node0, edge0 = node0 + n, edge0 + e
    return torch.stack(out)


def test_gnn_equals_a_slow_loop() -> None:
    torch.manual_seed(0)
    model = GNN(num_outputs=5, latent_dim=8, hidden_dims=(8,), num_message_passing_steps=2)
    graph = GraphsTuple(
        nodes=torch.randn(7, 9),
        edges=torch.randn(8, 3),
        receivers=torch.tensor([1, 2, 0, 1, 4, 3, 6, 5]),
        senders=torch.tensor([0, 1, 1, 2, 3, 4, 5, 6]),
        globals=None,
        n_node=torch.tensor([3, 4]),
        n_edge=torch.tensor([4, 4]),
    )
    torch.testing.assert_close(model(graph, 0.0), slow_gnn(model, graph))


def test_chain_hands_the_rate_on() -> None:
    chain = Chain(Dropout())
    x = torch.ones(1000)
    assert torch.equal(chain(x, 0.0), x)
    assert 300 < int((chain(x, 0.5) == 0).sum()) < 700
    assert torch.equal(chain.eval()(x, 0.5), x)


@pytest.mark.parametrize("name", ["fastmri_mini", "imagenet_vit_mini", "ogbg_mini"])
def test_dropout_default_and_repeatability(name: str) -> None:
    workload = workloads.load(name)
    model, _ = workload.init_model_fn(RNG)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # away from the head's zeros
    batch = workload.synthetic_batch(4, RNG)

    def run(mode: ForwardPassMode, rng: np.ndarray, **rate: float) -> Tensor:
        return workload.model_fn(model, batch, None, mode, rng, False, **rate)[0].detach()

    train, evaluate = ForwardPassMode.TRAIN, ForwardPassMode.EVAL
    plain = run(train, RNG, dropout_rate=0.0)
    # AlgoPerf's defaults: none, but 0.1 on OGBG.
    assert torch.equal(run(train, RNG), plain) == (name != "ogbg_mini")
    assert not torch.equal(run(train, RNG, dropout_rate=0.3), plain)
    assert torch.equal(run(train, RNG, dropout_rate=0.3), run(train, RNG, dropout_rate=0.3))
    assert not torch.equal(run(train, RNG, dropout_rate=0.3), run(train, RNG + 1, dropout_rate=0.3))
    assert torch.equal(run(evaluate, RNG, dropout_rate=0.3), plain)


@pytest.mark.parametrize("name", workloads.names())
def test_synthetic_batches_fit_the_model(name: str) -> None:
    workload = workloads.load(name)
    model, _ = workload.init_model_fn(RNG)
    batch = workload.synthetic_batch(2, RNG)
    logits, _ = workload.model_fn(model, batch, None, ForwardPassMode.EVAL, RNG, False)
    loss = workload.loss_fn(batch["targets"], logits, batch.get("weights"), label_smoothing=0.1)
    assert torch.isfinite(loss["summed"])
    if name == "fastmri":
        assert batch["inputs"].shape == batch["targets"].shape == (2, 320, 320)
    if name == "imagenet_vit":
        assert batch["inputs"].shape == (2, 3, 224, 224)
        torch.testing.assert_close(batch["targets"].sum(dim=1), torch.ones(2))
    if name == "ogbg":
        assert batch["targets"].shape == batch["weights"].shape == (2, 128)
        assert batch["inputs"].nodes.shape[1] == 9 and batch["inputs"].edges.shape[1] == 3
