"""The three networks, at any size. Plain torch; parameter names and order are AlgoPerf's."""

from algoperf_shampoo.workloads.models.gnn import GNN, GraphsTuple
from algoperf_shampoo.workloads.models.unet import UNet
from algoperf_shampoo.workloads.models.vit import ViT

__all__ = ["GNN", "GraphsTuple", "UNet", "ViT"]
