"""ResNet-50 that keeps its resolution with dilated convolutions."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lightning_gradnorm._messages import check
from lightning_gradnorm.experiments.problems.dense.networks.images import ImageNetInput
from lightning_gradnorm.experiments.problems.dense.networks.pretrained import load_pretrained
from lightning_gradnorm.experiments.problems.dense.networks.resnet import ResNet50
from lightning_gradnorm.experiments.problems.dense.networks.widths import check_width, initialize

_check = partial(check, "DilatedResNet50")
_STRIDES_AND_DILATIONS = {
    8: ((1, 2, 1, 1), (1, 1, 2, 4)),
    16: ((1, 2, 2, 1), (1, 1, 1, 2)),
}


class DilatedResNet50(ResNet50):
    """ResNet-50 whose last stages dilate their convolutions instead of striding: the common multi-task trunk on NYUv2.

    Each task uses a `DeepLabHead` on top. The last shared layer is the last convolution of the last bottleneck,
    ``layer4.2.conv3``. The shortcut added to it has no weights.

    Sources: Yu et al., Dilated Residual Networks, CVPR 2017; setup of LibMTL's example on NYUv2.

    Args:
        output_stride: Image pixels per pixel of the representation: 8 (the last two stages dilate) or 16 (only the last).
        width: Factor on all channels, a multiple of 1/16.
        pretrained: File with the state dict of torchvision's ``resnet50``, loaded except for the classifier ``fc``.
            ``None`` initializes all weights randomly.
        standardize: Subtract ImageNet's mean from the images and divide by its standard deviation.

    Raises:
        ValueError: An argument is out of range, the weights belong to another network, or images have another shape.
        FileNotFoundError: ``pretrained`` does not exist.

    Shape: ``(batch, 3, height, width)``, floats in [0, 1], any size, to ``(batch, trunk.out_channels, ⌈height /
    output_stride⌉, ⌈width / output_stride⌉)``; heads interpolate to the size of the targets.

    The state dict has torchvision's names, ``layer1.0.conv1.weight`` and so on. 23.5 million parameters.

    Example:
        >>> import torch
        >>> trunk = DilatedResNet50(width=0.125)
        >>> trunk(torch.zeros(2, 3, 64, 96)).shape, trunk.out_channels
        (torch.Size([2, 256, 8, 12]), 256)
    """

    def __init__(
        self,
        output_stride: int = 8,
        width: float = 1.0,
        pretrained: str | Path | None = None,
        standardize: bool = True,
    ) -> None:
        _check(output_stride in _STRIDES_AND_DILATIONS, "output_stride", "8 or 16", output_stride)
        check_width("DilatedResNet50", width, pretrained)
        strides, dilations = _STRIDES_AND_DILATIONS[output_stride]
        image_input = ImageNetInput("DilatedResNet50", standardize=standardize)
        super().__init__(image_input, width, strides=strides, dilations=dilations)
        self.out_channels = self.feature_channels
        initialize(self)
        if pretrained is not None:
            part = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.", "layer4.")
            load_pretrained(self, pretrained, owner="DilatedResNet50", model="resnet50", part=part, left_out=("fc.",))
