"""OGBG: message passing over molecules. Masked binary cross entropy, mean average precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algoperf_shampoo.contract import LossType
from algoperf_shampoo.workloads.base import Batch, Workload
from algoperf_shampoo.workloads.config import Schema
from algoperf_shampoo.workloads.data import read_arrays
from algoperf_shampoo.workloads.metrics import mean_average_precision
from algoperf_shampoo.workloads.models import GNN, GraphsTuple
from algoperf_shampoo.workloads.queues import MakeBatch

NODE_FEATURES, EDGE_FEATURES = 9, 3
SPLITS = ("train", "validation", "test")
MISSING = -1
MEAN_NODES = 26  # of ogbg-molpcba; bonds follow as 28 a graph, 56 directed edges


def runs(starts: Tensor, lengths: Tensor) -> Tensor:
    """The integers of the runs [start, start + length), one run after the other."""
    total = int(lengths.sum())
    shift = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(total, device=starts.device) + shift.repeat_interleave(
        lengths, output_size=total
    )


@dataclass(frozen=True)
class GraphStore:
    """Many graphs end to end, from which any of them are gathered into a batch without a loop.

    Attributes:
      nodes: float32 [all nodes, 9]; edges: float32 [all edges, 3].
      senders, receivers: int64 [all edges], counted from the graph's own first node.
      first_node, first_edge, n_node, n_edge: int64 [graphs].
    """

    nodes: Tensor
    edges: Tensor
    senders: Tensor
    receivers: Tensor
    first_node: Tensor
    first_edge: Tensor
    n_node: Tensor
    n_edge: Tensor

    @classmethod
    def from_bonds(
        cls, nodes: Tensor, bonds: Tensor, ends: Tensor, n_node: Tensor, n_bond: Tensor
    ) -> GraphStore:
        """Every bond becomes two edges: a graph's bonds as given, then all of them reversed.

        Args:
          nodes: [all nodes, 9]; bonds: [all bonds, 3]; ends: [all bonds, 2], within the graph.
          n_node, n_bond: int64 [graphs].
        """
        first_bond = n_bond.cumsum(0) - n_bond
        both = torch.stack([first_bond, first_bond], dim=1).flatten()
        bond = runs(both, n_bond.repeat_interleave(2))  # each graph's run of bonds, twice
        reverse = torch.tensor([False, True]).repeat(len(n_bond))
        reverse = reverse.repeat_interleave(n_bond.repeat_interleave(2))
        start, stop = ends[bond].long().unbind(dim=1)
        n_edge = 2 * n_bond
        return cls(
            nodes=nodes.float(),
            edges=bonds[bond].float(),
            senders=torch.where(reverse, stop, start),
            receivers=torch.where(reverse, start, stop),
            first_node=n_node.cumsum(0) - n_node,
            first_edge=n_edge.cumsum(0) - n_edge,
            n_node=n_node,
            n_edge=n_edge,
        )

    def to(self, device: torch.device) -> GraphStore:
        return GraphStore(**{key: value.to(device) for key, value in vars(self).items()})

    def batch(self, chosen: Tensor) -> GraphsTuple:
        """The graphs ``chosen`` (int64 [B]) as one batch."""
        n_node, n_edge = self.n_node[chosen], self.n_edge[chosen]
        nodes = runs(self.first_node[chosen], n_node)
        edges = runs(self.first_edge[chosen], n_edge)
        offset = n_node.cumsum(0) - n_node
        offset = offset.repeat_interleave(n_edge, output_size=len(edges))
        return GraphsTuple(
            nodes=self.nodes.index_select(0, nodes),
            edges=self.edges.index_select(0, edges),
            receivers=self.receivers.index_select(0, edges) + offset,
            senders=self.senders.index_select(0, edges) + offset,
            globals=None,
            n_node=n_node,
            n_edge=n_edge,
        )


class OGBG(Workload):
    """Mini: ligands of 30 targets from ChEMBL; which are they of? Most labels are missing.

    Node and edge features are the numbers of OGB's featuriser. Batches hold whole graphs, as many
    as asked for (AlgoPerf fills fixed budgets of nodes and edges and pads).
    """

    full_name = "ogbg"
    loss_type = LossType.SOFTMAX_CROSS_ENTROPY  # what AlgoPerf calls it; the loss itself is binary
    default_dropout_rate = 0.1
    model_schema = {
        "num_outputs": int,
        "latent_dim": int,
        "hidden_dims": [int],
        "num_message_passing_steps": int,
    }
    data_schema: ClassVar[Schema] = {}

    def _check(self) -> None:
        pass

    def _new_model(self) -> nn.Module:
        sizes = {**self.config.model, "hidden_dims": tuple(self.config.model["hidden_dims"])}
        return GNN(**sizes, node_features=NODE_FEATURES, edge_features=EDGE_FEATURES)

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        """Logits [graphs, tasks] from the batch's "inputs", a ``GraphsTuple``."""
        return model(batch["inputs"], dropout_rate=dropout_rate)

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Binary cross entropy of each label [B, tasks], 0 where the mask is; no mask, all count.

        "n_valid_examples" counts labels, not graphs. Label smoothing s replaces the label y by
        (1 - s) y + s / tasks, AlgoPerf's rule (for a single binary label one would expect s / 2).

        Raises:
          ValueError: labels, logits and mask differ in shape.
        """
        if mask_batch is None:
            mask_batch = torch.ones_like(label_batch)
        if not label_batch.shape == logits_batch.shape == mask_batch.shape:
            raise ValueError(
                f"labels {tuple(label_batch.shape)}, logits {tuple(logits_batch.shape)} and mask "
                f"{tuple(mask_batch.shape)} differ in shape"
            )
        known = mask_batch.bool()
        # A missing label may be NaN, whose gradient would survive the mask below.
        labels = torch.where(known, label_batch, 0.0)
        labels = (1.0 - label_smoothing) * labels + label_smoothing / labels.shape[-1]
        losses = F.binary_cross_entropy_with_logits(logits_batch, labels, reduction="none")
        losses = torch.where(known, losses, 0.0)
        return {
            "summed": losses.sum(),
            "n_valid_examples": mask_batch.sum(),
            "per_example": losses,
        }

    def _open_split(
        self, split: str, data_dir: str | Path | None, data_rng: Any
    ) -> tuple[int, MakeBatch]:
        del data_rng
        settings = self.config.data
        assert settings is not None
        arrays = read_arrays(data_dir, settings["file"], settings["sha256"])
        source = "train" if split == "eval_train" else split
        members = np.flatnonzero(arrays["splits"] == SPLITS.index(source))
        labels = torch.from_numpy(arrays["labels"][members])
        if labels.shape[1] != self.config.model["num_outputs"]:
            raise self._complain(
                "model.num_outputs",
                self.config.model["num_outputs"],
                f"the data has {labels.shape[1]} tasks",
            )
        features, sizes = (
            ("node_features", "bond_features", "bond_ends"),
            ("num_nodes", "num_bonds"),
        )
        store = GraphStore.from_bonds(
            *(torch.from_numpy(arrays[key].T) for key in features),
            *(torch.from_numpy(arrays[key]).long() for key in sizes),
        ).to(self.device)
        known = (labels != MISSING).to(self.device)
        targets = labels.clamp(min=0).float().to(self.device)
        where = torch.from_numpy(members).to(self.device)

        def make_batch(indices: np.ndarray, draw: int) -> Batch:
            del draw  # no augmentation
            chosen = torch.from_numpy(indices).to(self.device)
            return {
                "inputs": store.batch(where[chosen]),
                "targets": targets[chosen],
                "weights": known[chosen],
            }

        return self._check_count(source, len(members)), make_batch

    def _evaluate(self, model: nn.Module, batches: list[Batch], rng: Any) -> dict[str, float]:
        """The loss is averaged over known labels (AlgoPerf: over all, missing ones as 0).

        A logit with a known label that is not finite makes both NaN.
        """
        loss, count = 0.0, 0
        parts: list[tuple[np.ndarray, ...]] = []
        for batch in batches:
            logits = self._evaluated(model, batch, rng)
            found = self.loss_fn(batch["targets"], logits, batch["weights"])
            loss += float(found["summed"])
            count += int(found["n_valid_examples"])
            tensors = (batch["targets"], logits, batch["weights"])
            parts.append(tuple(t.cpu().numpy() for t in tensors))
        labels, scores, known = (np.concatenate(part) for part in zip(*parts, strict=True))
        finite = np.isfinite(scores[known]).all()
        return {
            "mean_average_precision": mean_average_precision(labels, scores, known),
            "loss": loss / max(count, 1) if finite else math.nan,
        }

    def synthetic_batch(self, batch_size: int, rng: Any) -> Batch:
        """Random graphs of about 26 nodes and 56 directed edges; an eighth of labels missing."""
        source = self._torch_generator(rng)
        n_node = torch.randint(MEAN_NODES - 12, MEAN_NODES + 13, (batch_size,), generator=source)
        n_bond = n_node + 2  # a tree with three rings closed
        total, bonds = int(n_node.sum()), int(n_bond.sum())
        size = n_node.repeat_interleave(n_bond)
        ends = (torch.rand((2, bonds), generator=source) * size).long()
        store = GraphStore.from_bonds(
            torch.randint(10, (total, NODE_FEATURES), generator=source),
            torch.randint(3, (bonds, EDGE_FEATURES), generator=source),
            ends.T,
            n_node,
            n_bond,
        ).to(self.device)
        shape = (batch_size, self.config.model["num_outputs"])
        known = torch.rand(shape, generator=source) > 0.125
        targets = (torch.rand(shape, generator=source) < 0.3) & known
        return {
            "inputs": store.batch(torch.arange(batch_size, device=self.device)),
            "targets": targets.float().to(self.device),
            "weights": known.to(self.device),
        }
