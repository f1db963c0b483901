"""Vision transformer of the SimpleViT kind: sin-cos positions, mean pooling (Beyer et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algoperf_shampoo.workloads.models.layers import lecun_normal_

LAYER_NORM_EPS = 1e-6


def sincos_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Two-dimensional sin-cos position embedding (MoCo v3), [height * width, channels].

    A quarter of the channels each for sin x, cos x, sin y, cos y, at wavelengths from 2 pi to
    20,000 pi patches. ``channels`` must be a multiple of 4, and at least 8.
    """
    quarter = channels // 4
    exponents = torch.arange(quarter, device=device) / (quarter - 1)
    frequencies = 1.0 / (10_000.0**exponents)
    y, x = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    angles_y = y.reshape(-1, 1) * frequencies  # [h * w, C / 4]
    angles_x = x.reshape(-1, 1) * frequencies
    return torch.cat([angles_x.sin(), angles_x.cos(), angles_y.sin(), angles_y.cos()], dim=1)


class SelfAttention(nn.Module):
    """Multi-head self-attention; queries, keys and values from separate projections."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, heads, T, C / heads]

    def forward(self, x: Tensor, rate: float) -> Tensor:
        query, key, value = (self._heads(f(x)) for f in (self.query, self.key, self.value))
        # Spelled out: the fused kernels' backward passes do not repeat to the bit on every device.
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])  # [B, heads, T, T]
        weights = F.dropout(scores.softmax(dim=-1), rate, training=self.training)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with the tanh approximation of GELU between."""

    def __init__(self, width: int, mlp_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, mlp_dim)
        self.linear2 = nn.Linear(mlp_dim, width)
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def forward(self, x: Tensor, rate: float) -> Tensor:
        x = F.gelu(self.linear1(x), approximate="tanh")
        return self.linear2(F.dropout(x, rate, training=self.training))


class EncoderBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.layer_norm0 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.self_attention1 = SelfAttention(width, num_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp3 = MLP(width, mlp_dim)

    def forward(self, x: Tensor, rate: float) -> Tensor:
        y = self.self_attention1(self.layer_norm0(x), rate)
        x = x + F.dropout(y, rate, training=self.training)
        y = self.mlp3(self.layer_norm2(x), rate)
        return x + F.dropout(y, rate, training=self.training)


class Encoder(nn.Module):
    """Blocks, then a last layer norm."""

    def __init__(self, depth: int, width: int, mlp_dim: int, num_heads: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(EncoderBlock(width, mlp_dim, num_heads) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, x: Tensor, rate: float) -> Tensor:
        for block in self.net:
            x = block(x, rate)
        return self.encoder_norm(x)


class ViT(nn.Module):
    """Maps images [B, in_channels, H, W] to logits [B, num_classes]. The head starts at zero.

    AlgoPerf's ImageNet ViT is S/16: width 384, depth 12, mlp_dim 1536, 6 heads, 16x16 patches,
    22,122,472 parameters in 200 tensors.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        patch_size: int = 16,
        width: int = 384,
        depth: int = 12,
        mlp_dim: int = 1536,
        num_heads: int = 6,
    ) -> None:
        super().__init__()
        self.pre_logits = nn.Linear(width, width)
        self.conv_patch_extract = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.encoder = Encoder(depth, width, mlp_dim, num_heads)
        self.head = nn.Linear(width, num_classes)
        lecun_normal_(self.conv_patch_extract)
        lecun_normal_(self.pre_logits)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, dropout_rate: float = 0.0) -> Tensor:
        x = self.conv_patch_extract(x)  # [B, C, h, w]
        positions = sincos_positions(x.shape[2], x.shape[3], x.shape[1], x.device).to(x.dtype)
        x = x.flatten(2).transpose(1, 2) + positions  # [B, h * w, C]
        x = F.dropout(x, dropout_rate, training=self.training)
        x = self.encoder(x, dropout_rate).mean(dim=1)
        return self.head(torch.tanh(self.pre_logits(x)))
