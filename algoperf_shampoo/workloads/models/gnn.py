"""Message-passing network over batched graphs (Battaglia et al. 2018, Algorithm 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from algoperf_shampoo.workloads.models.layers import Chain, Dropout, lecun_normal_

LAYER_NORM_EPS = 1e-6


class GraphsTuple(NamedTuple):
    """A batch of graphs laid end to end; field names and order are jraph's, so AlgoPerf's.

    Attributes:
      nodes: float32 [sum of nodes, node features].
      edges: float32 [sum of edges, edge features]; every bond appears once in each direction.
      receivers, senders: int64 [sum of edges], positions in ``nodes``.
      globals: one row a graph, or None.
      n_node, n_edge: int64 [graphs].
    """

    nodes: Tensor
    edges: Tensor
    receivers: Tensor
    senders: Tensor
    globals: Tensor | None
    n_node: Tensor
    n_edge: Tensor


def sum_rows(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums rows [N, C] into [size, C]: row i is added to ``index[i]``."""
    # index_add, not scatter_add: its backward is a row gather, twice as fast on a CPU.
    return rows.new_zeros(size, rows.shape[-1]).index_add_(0, index, rows)


def dense(in_features: int, hidden_dims: tuple[int, ...]) -> Chain:
    """Linear, layer norm, ReLU, dropout, for each hidden width."""
    layers = Chain()
    for i, width in enumerate(hidden_dims):
        layers.add_module(f"dense_{i}", nn.Linear(in_features, width))
        layers.add_module(f"norm_{i}", nn.LayerNorm(width, eps=LAYER_NORM_EPS))
        layers.add_module(f"activation_fn_{i}", nn.ReLU())
        layers.add_module(f"dropout_{i}", Dropout())
        in_features = width
    return layers


class MessagePassing(nn.Module):
    """One round: edges from their ends, nodes from their edges, the graph's row from both."""

    def __init__(self, edge: int, node: int, graph: int, hidden_dims: tuple[int, ...]) -> None:
        """``edge``, ``node`` and ``graph`` are the widths that enter the round."""
        super().__init__()
        out = hidden_dims[-1]
        self.update_edge_fn = dense(edge + 2 * node + graph, hidden_dims)
        self.update_node_fn = dense(node + 2 * out + graph, hidden_dims)
        self.update_global_fn = dense(2 * out + graph, hidden_dims)

    def forward(
        self,
        nodes: Tensor,
        edges: Tensor,
        rows: Tensor,
        graph: GraphsTuple,
        node_graph: Tensor,
        edge_graph: Tensor,
        rate: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Takes and returns node, edge and graph features; ``*_graph`` name each one's graph."""
        senders, receivers = graph.senders, graph.receivers
        ends = [
            edges,
            nodes.index_select(0, senders),
            nodes.index_select(0, receivers),
            rows.index_select(0, edge_graph),
        ]
        edges = self.update_edge_fn(torch.cat(ends, dim=-1), rate)
        sent = sum_rows(edges, senders, len(nodes))
        received = sum_rows(edges, receivers, len(nodes))
        around = [nodes, sent, received, rows.index_select(0, node_graph)]
        nodes = self.update_node_fn(torch.cat(around, dim=-1), rate)
        pooled = [
            sum_rows(nodes, node_graph, len(rows)),
            sum_rows(edges, edge_graph, len(rows)),
            rows,
        ]
        return nodes, edges, self.update_global_fn(torch.cat(pooled, dim=-1), rate)


class GNN(nn.Module):
    """Maps graphs to logits [graphs, num_outputs].

    AlgoPerf's OGBG: 128 outputs, widths 256, 5 rounds, 3,554,176 parameters in 66 tensors. The
    graph's row starts as zeros of width ``num_outputs``.
    """

    def __init__(
        self,
        num_outputs: int = 128,
        latent_dim: int = 256,
        hidden_dims: tuple[int, ...] = (256,),
        num_message_passing_steps: int = 5,
        node_features: int = 9,
        edge_features: int = 3,
    ) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.node_embedder = nn.Linear(node_features, latent_dim)
        self.edge_embedder = nn.Linear(edge_features, latent_dim)
        out = hidden_dims[-1]
        first = MessagePassing(latent_dim, latent_dim, num_outputs, hidden_dims)
        later = [
            MessagePassing(out, out, out, hidden_dims) for _ in range(num_message_passing_steps - 1)
        ]
        self.graph_network = nn.ModuleList([first, *later])
        self.decoder = nn.Linear(out, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                lecun_normal_(module)

    def forward(self, graph: GraphsTuple, dropout_rate: float = 0.1) -> Tensor:
        n_graphs = len(graph.n_node)
        each = torch.arange(n_graphs, device=graph.n_node.device)
        node_graph = each.repeat_interleave(graph.n_node, output_size=len(graph.nodes))
        edge_graph = each.repeat_interleave(graph.n_edge, output_size=len(graph.edges))
        nodes = self.node_embedder(graph.nodes)
        edges = self.edge_embedder(graph.edges)
        rows = nodes.new_zeros(n_graphs, self.num_outputs)
        for layer in self.graph_network:
            nodes, edges, rows = layer(
                nodes, edges, rows, graph, node_graph, edge_graph, dropout_rate
            )
        return self.decoder(rows)
