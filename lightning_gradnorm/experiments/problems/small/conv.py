"""Convolutional trunk for small images."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

GRID = 4
GROUPS = 8


class ConvEncoder(nn.Module):
    """Convolutions that each halve the image, then one linear layer over a 4 x 4 grid of features.

    Each stage is a 3 x 3 convolution with stride 2 (the first is 5 x 5), a group normalization and a ReLU. The grid keeps
    *where* things are, which tasks like "the digit on the left" need. The last linear layer, followed by a ReLU, is the
    last shared layer. Each sample is normalized separately, so ranks, accumulation and evaluation use the same network.

    Args:
        in_channels: Channels of the image.
        channels: Channels after each stage.
        out_features: Length of the representation.

    Raises:
        ValueError: There is no stage, or a number is not positive.

    Shape: ``(batch, in_channels, height, width)``, height and width 8 or more, to ``(batch, out_features)``.

    Example:
        >>> import torch
        >>> ConvEncoder()(torch.zeros(2, 1, 36, 36)).shape
        torch.Size([2, 128])
    """

    def __init__(self, in_channels: int = 1, channels: Sequence[int] = (32, 64, 64), out_features: int = 128) -> None:
        super().__init__()
        if not channels or min(in_channels, out_features, *channels) < 1:
            raise ValueError(
                f"ConvEncoder: in_channels, channels and out_features should be positive, channels at least one; got "
                f"in_channels={in_channels}, channels={list(channels)}, out_features={out_features}."
            )
        self.out_features = out_features
        stages: list[nn.Module] = []
        kernel = 5
        for channels_in, channels_out in zip([in_channels, *channels], channels, strict=False):
            convolution = nn.Conv2d(channels_in, channels_out, kernel, stride=2, padding=kernel // 2)
            stages += [convolution, nn.GroupNorm(math.gcd(GROUPS, channels_out), channels_out), nn.ReLU()]
            kernel = 3
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveMaxPool2d(GRID)
        self.project = nn.Sequential(nn.Flatten(), nn.Linear(channels[-1] * GRID * GRID, out_features), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        """Return the representation of a batch of images."""
        representation: Tensor = self.project(self.pool(self.stages(images)))
        return representation
