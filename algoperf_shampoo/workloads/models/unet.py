"""U-Net for image reconstruction (Ronneberger et al. 2015; Zbontar et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from algoperf_shampoo.workloads.models.layers import Chain, Dropout2d, lecun_normal_


def _activation() -> nn.Module:
    return nn.LeakyReLU(negative_slope=0.2, inplace=True)


class ConvBlock(nn.Module):
    """Twice: 3x3 convolution, instance normalisation without parameters, leaky ReLU, dropout."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_layers = Chain(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.InstanceNorm2d(out_channels),
            _activation(),
            Dropout2d(),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.InstanceNorm2d(out_channels),
            _activation(),
            Dropout2d(),
        )

    def forward(self, x: Tensor, rate: float) -> Tensor:
        return self.conv_layers(x, rate)


class OutputBlock(Chain):
    """The last convolutional block, followed by a 1x1 convolution to the output channels."""

    def __init__(self, in_channels: int, channels: int, out_channels: int) -> None:
        super().__init__(
            ConvBlock(in_channels, channels), nn.Conv2d(channels, out_channels, kernel_size=1)
        )

    def forward(self, x: Tensor, rate: float) -> Tensor:  # type: ignore[override]
        return self[1](self[0](x, rate))


class UpBlock(nn.Module):
    """2x2 transposed convolution with stride 2, instance normalisation, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2, bias=False),
            nn.InstanceNorm2d(out_channels),
            _activation(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class UNet(nn.Module):
    """Maps images [B, 1, H, W] to images of the same shape.

    The channels double at each of the ``num_pool_layers`` levels. AlgoPerf's FastMRI: 32 channels,
    4 levels, 7,756,097 parameters in 24 tensors.
    """

    def __init__(self, num_channels: int = 32, num_pool_layers: int = 4) -> None:
        super().__init__()
        widths = [num_channels * 2**level for level in range(num_pool_layers)]
        deepest = 2 * widths[-1]
        self.down_sample_layers = nn.ModuleList(
            ConvBlock(before, width) for before, width in zip([1, *widths], widths, strict=False)
        )
        self.conv = ConvBlock(widths[-1], deepest)
        self.up_conv = nn.ModuleList()
        self.up_transpose_conv = nn.ModuleList()
        for width in reversed(widths):
            self.up_transpose_conv.append(UpBlock(2 * width, width))
            last = width == num_channels
            block = OutputBlock(2 * width, width, 1) if last else ConvBlock(2 * width, width)
            self.up_conv.append(block)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                lecun_normal_(module)

    def forward(self, x: Tensor, dropout_rate: float = 0.0) -> Tensor:
        skips = []
        for down in self.down_sample_layers:
            x = down(x, dropout_rate)  # [B, C * 2^level, H / 2^level, W / 2^level]
            skips.append(x)
            x = F.avg_pool2d(x, kernel_size=2)
        x = self.conv(x, dropout_rate)
        for up, conv in zip(self.up_transpose_conv, self.up_conv, strict=True):
            skip = skips.pop()
            x = up(x)
            rows, columns = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
            if rows or columns:  # pooling rounded an odd size down
                x = F.pad(x, (0, columns, 0, rows), mode="reflect")
            x = conv(torch.cat([x, skip], dim=1), dropout_rate)
        return x
