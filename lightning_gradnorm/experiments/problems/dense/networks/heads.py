"""Heads that predict a map: from a representation ``(batch, channels, h, w)`` to ``(batch, out_channels, h', w')``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm._messages import check, is_integer
from lightning_gradnorm.experiments.problems.dense.networks.widths import initialize


class DenseHead(nn.Module):
    """A head for per-pixel predictions: `layers`, then interpolation to ``size``.

    Args:
        layers: Layers from the representation to the prediction, with a convolution last. Its weights are initialized with
            variance ``1 / in_channels``, so the first predictions are of order one for any task.
        size: Height and width of the prediction; ``None`` for those of the representation. Interpolation is bilinear with
            aligned corners, as in the common code for NYUv2.

    Raises:
        ValueError: ``size`` is not a pair of positive integers.
    """

    def __init__(self, layers: nn.Sequential, size: Sequence[int] | None) -> None:
        super().__init__()
        is_size = size is None or (len(size) == 2 and all(is_integer(side) and side > 0 for side in size))
        check(type(self).__name__, is_size, "size", "None or (height, width)", size)
        self.size = None if size is None else (size[0], size[1])
        self.layers = layers
        initialize(self)
        # He's initialization counts outputs and assumes a ReLU. The first depths would be about ten meters off.
        last = layers[-1]
        assert isinstance(last, nn.Conv2d)
        nn.init.kaiming_normal_(last.weight, nonlinearity="linear")

    def forward(self, representation: Tensor) -> Tensor:
        """Return the prediction."""
        prediction: Tensor = self.layers(representation)
        if self.size is not None and prediction.shape[-2:] != self.size:
            prediction = F.interpolate(prediction, self.size, mode="bilinear", align_corners=True)
        return prediction


class ConvHead(DenseHead):
    """One 1 x 1 convolution: "all parameters shared up to the last layer". Optionally with a 3 x 3 convolution before it.

    Args:
        in_channels: Channels of the representation.
        out_channels: Channels of the prediction.
        hidden: Channels of a preceding 3 x 3 convolution with batch normalization and ReLU; ``None`` for none.
        size: Height and width of the prediction; ``None`` for those of the representation.

    Raises:
        ValueError: A number is not positive.

    Example:
        >>> ConvHead(32, 13)(torch.zeros(2, 32, 16, 24)).shape
        torch.Size([2, 13, 16, 24])
        >>> ConvHead(32, 13, hidden=64, size=(120, 160))(torch.zeros(2, 32, 16, 24)).shape
        torch.Size([2, 13, 120, 160])
    """

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int | None = None, size: Sequence[int] | None = None
    ) -> None:
        _check_counts(
            "ConvHead", in_channels=in_channels, out_channels=out_channels, hidden=1 if hidden is None else hidden
        )
        before = [] if hidden is None else _convolution(in_channels, hidden, 3, padding=1)
        last = nn.Conv2d(hidden or in_channels, out_channels, 1)
        super().__init__(nn.Sequential(*before, last), size)


class DeepLabHead(DenseHead):
    """The head of DeepLabv3, which looks around each pixel at several distances.

    Five branches process the representation, each with about a quarter of its channels: the pixel itself, its neighbors at
    three distances, and the mean of the whole image. One 1 x 1 convolution combines them, a 3 x 3 and a 1 x 1 follow.
    It has 16.1 million parameters on ResNet-50, so three heads have twice the parameters of the trunk. ``channels=64`` makes
    a light one.

    Sources: Chen et al., Rethinking Atrous Convolution, 2017 (arXiv 1706.05587); same numbers as torchvision and LibMTL.

    Args:
        in_channels: Channels of the representation.
        out_channels: Channels of the prediction.
        channels: Channels of each branch and of the following layers.
        rates: Distances of the neighbors, in pixels of the representation.
        dropout: Dropout rate of the combined branches.
        size: Height and width of the prediction; ``None`` for those of the representation.

    Raises:
        ValueError: A number is out of range, or a training batch has a single image, whose mean cannot be normalized
            over the batch.

    Example:
        >>> DeepLabHead(32, 13, channels=8, size=(64, 96))(torch.zeros(2, 32, 8, 12)).shape
        torch.Size([2, 13, 64, 96])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 256,
        rates: Sequence[int] = (12, 24, 36),
        dropout: float = 0.5,
        size: Sequence[int] | None = None,
    ) -> None:
        _check_counts("DeepLabHead", in_channels=in_channels, out_channels=out_channels, channels=channels)
        are_rates = all(is_integer(rate) and rate > 0 for rate in rates)
        check("DeepLabHead", are_rates, "rates", "positive integers", list(rates))
        layers = nn.Sequential(
            _Pyramid(in_channels, channels, rates),
            *_convolution((len(rates) + 2) * channels, channels, 1),
            nn.Dropout(dropout),
            *_convolution(channels, channels, 3, padding=1),
            nn.Conv2d(channels, out_channels, 1),
        )
        super().__init__(layers, size)

    def forward(self, representation: Tensor) -> Tensor:
        """Return the prediction."""
        if self.training and len(representation) == 1:
            raise ValueError(
                "DeepLabHead: a training batch should have 2 images or more, since its whole-image branch is normalized "
                "over the batch; got 1. Drop an incomplete last batch: drop_last=True of the data module or loader."
            )
        return super().forward(representation)


class _Pyramid(nn.Module):
    """The branches of `DeepLabHead`, concatenated."""

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int]) -> None:
        super().__init__()
        around = [nn.Sequential(*_convolution(in_channels, channels, 3, padding=r, dilation=r)) for r in rates]
        self.branches = nn.ModuleList([nn.Sequential(*_convolution(in_channels, channels, 1)), *around])
        self.whole = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_convolution(in_channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        whole = self.whole(x).expand(-1, -1, *x.shape[-2:])
        return torch.cat([*(branch(x) for branch in self.branches), whole], dim=1)


def _convolution(
    in_channels: int, out_channels: int, kernel: int, padding: int = 0, dilation: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def _check_counts(owner: str, **counts: int) -> None:
    for name, value in counts.items():
        check(owner, is_integer(value) and value > 0, name, "a positive integer", value)
