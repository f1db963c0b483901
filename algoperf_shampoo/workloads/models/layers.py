"""What the three networks share: AlgoPerf's default initialisation, and dropout by argument."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

# Standard deviation of a unit normal cut off at two deviations; dividing by it restores one.
TRUNCATED_NORMAL_STD = 0.87962566103423978


def lecun_normal_(module: nn.Module) -> None:
    """LeCun normal weights (truncated at two deviations, variance 1/fan_in), zero bias, in place.

    fan_in is torch's: size of dimension 1 times the receptive field. For a transposed convolution,
    stored (in, out, kh, kw), that counts the outputs, as it does in AlgoPerf.

    Args:
      module: a linear or (transposed) convolutional layer.
    """
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    std = math.sqrt(1.0 / weight[0].numel()) / TRUNCATED_NORMAL_STD
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)


class Dropout(nn.Module):
    """Dropout whose rate is an argument of the call."""

    def forward(self, x: Tensor, rate: float) -> Tensor:
        return F.dropout(x, rate, training=self.training)


class Dropout2d(Dropout):
    """Drops whole feature maps of [B, C, H, W]."""

    def forward(self, x: Tensor, rate: float) -> Tensor:
        return F.dropout2d(x, rate, training=self.training)


class Chain(nn.Sequential):
    """``nn.Sequential`` that hands the dropout rate to the members that take one."""

    def forward(self, x: Tensor, rate: float) -> Tensor:  # type: ignore[override]
        for module in self:
            x = module(x, rate) if isinstance(module, Dropout | Chain) else module(x)
        return x
