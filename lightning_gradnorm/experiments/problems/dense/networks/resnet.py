"""ResNet-50 without its classifier, with torchvision's names: the base of the networks made from it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_gradnorm.experiments.problems.dense.networks.images import ImageNetInput

EXPANSION = 4
BLOCKS = (3, 4, 6, 3)


class Bottleneck(nn.Module):
    """Three convolutions, 1 x 1, 3 x 3 and 1 x 1, plus a shortcut. The middle one has the stride, as in torchvision.

    Args:
        in_channels: Input channels.
        channels: Channels in the middle. The output has four times as many.
        stride: Stride of the middle convolution and of the shortcut.
        dilation: Dilation of the middle convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        out_channels = EXPANSION * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both paths."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        x = x + shortcut
        result: Tensor = self.relu(x)
        return result


class ResNet50(nn.Module):
    """Stem and four stages of 3, 4, 6 and 3 bottlenecks.

    Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016 (arXiv 1512.03385).

    Args:
        image_input: Preprocessing of the images.
        width: Factor on all channels.
        channels: Channels of the middle of each stage's bottlenecks, before ``width``.
        strides: Stride of each stage, after the stem's 4.
        dilations: Dilation of each stage. Its first bottleneck has the dilation of the previous stage.

    Shape: ``(batch, 3, height, width)`` to ``(batch, resnet.feature_channels, height / stride, width / stride)``, each
    stride rounding up.
    """

    def __init__(
        self,
        image_input: ImageNetInput,
        width: float = 1.0,
        channels: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
    ) -> None:
        super().__init__()
        self.input = image_input
        stem = round(64 * width)
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        middles = [round(middle * width) for middle in channels]
        ins = [stem, *(EXPANSION * middle for middle in middles)]
        firsts = [1, *dilations]
        stages = [
            nn.Sequential(
                Bottleneck(ins[i], middles[i], strides[i], firsts[i]),
                *(Bottleneck(ins[i + 1], middles[i], 1, dilations[i]) for _ in range(BLOCKS[i] - 1)),
            )
            for i in range(len(BLOCKS))
        ]
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.feature_channels = ins[-1]

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of a batch of images."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.input(images)))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features
