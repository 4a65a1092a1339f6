"""The GradNorm paper's second network: a thin ResNet-50 with a shallow decoder that learns to upsample."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor, nn

from lightning_gradnorm._messages import check
from lightning_gradnorm.experiments.problems.dense.networks.images import ImageNetInput
from lightning_gradnorm.experiments.problems.dense.networks.pretrained import load_pretrained
from lightning_gradnorm.experiments.problems.dense.networks.resnet import EXPANSION, ResNet50
from lightning_gradnorm.experiments.problems.dense.networks.widths import check_width, initialize

_check = partial(check, "FCNResNet50")


class UpBlock(nn.Module):
    """A bottleneck that doubles the resolution with learned upsampling in both paths.

    The main path has a transposed 4 x 4 convolution with stride 2, the shortcut a transposed 2 x 2 one.

    Args:
        in_channels: Input channels.
        out_channels: Output channels. The middle has a quarter of them.

    Shape: ``(batch, in_channels, h, w)`` to ``(batch, out_channels, 2 h, 2 w)``.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        middle = max(out_channels // EXPANSION, 1)
        self.shortcut = nn.Sequential(
            nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.bottleneck = nn.Sequential(
            nn.Conv2d(in_channels, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.ConvTranspose2d(middle, middle, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU(inplace=True),
            nn.Conv2d(middle, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both paths."""
        result: Tensor = self.relu(self.bottleneck(x) + self.shortcut(x))
        return result


class FCNResNet50(ResNet50):
    """ResNet-50 with fewer filters and earlier strides, and the `UpBlock`s it needs. All of it is shared.

    The paper only says: "stride-2 layers are moved earlier and all 2048-filter layers are replaced by 1024-filter
    layers", a shallow ResNet decoder, all upsampling filters learned, 15 million parameters. Our interpretation:

    - the strides of the stages are 2, 2, 2, 1 instead of 1, 2, 2, 2: each happens a stage earlier, the total stays 32;
    - the last stage has 1024 filters, and 256 instead of 512 in the middle of its bottlenecks, the usual 1 to 4 ratio in
      ResNet. (With 512, the encoder alone would have 18.8 million parameters.);
    - each block of the decoder doubles the resolution and halves the channels, 1024 to 128 at a stride of 4. One 3 x 3
      convolution then combines both paths of the last block. That is the last shared layer.

    In total 15.4 million parameters: 11.9 in the encoder, 3.5 in the decoder.

    Sources: Chen et al., GradNorm, ICML 2018, section 5.1; He et al., CVPR 2016; the upsampling block is close to the
    up-projection of Laina et al., 3DV 2016 (arXiv 1606.00373).

    Args:
        output_stride: Image pixels per pixel of the representation: 1, 2, 4, 8 or 16.
        width: Factor on all channels, a multiple of 1/16.
        pretrained: File with the state dict of torchvision's ``resnet50``. The stem and stages 1 to 3 are loaded, which have
            the same shapes. ``layer4``, which is thinner here, and the classifier ``fc`` are not.
            ``None`` initializes all weights randomly.
        standardize: Subtract ImageNet's mean from the images and divide by its standard deviation.

    Raises:
        ValueError: An argument is out of range, the weights belong to another network, or images have other sizes.
        FileNotFoundError: ``pretrained`` does not exist.

    Shape: ``(batch, 3, height, width)``, floats in [0, 1], height and width multiples of 32, to
    ``(batch, fcn.out_channels, height / output_stride, width / output_stride)``.

    The state dict has torchvision's names for the encoder, ``layer1.0.conv1.weight`` and so on.

    Example:
        >>> import torch
        >>> trunk = FCNResNet50(width=0.25)
        >>> trunk(torch.zeros(2, 3, 64, 96)).shape, trunk.out_channels
        (torch.Size([2, 32, 16, 24]), 32)
    """

    def __init__(
        self,
        output_stride: int = 4,
        width: float = 1.0,
        pretrained: str | Path | None = None,
        standardize: bool = True,
    ) -> None:
        _check(output_stride in (1, 2, 4, 8, 16), "output_stride", "1, 2, 4, 8 or 16", output_stride)
        check_width("FCNResNet50", width, pretrained)
        image_input = ImageNetInput("FCNResNet50", multiple=32, standardize=standardize)
        super().__init__(image_input, width, channels=(64, 128, 256, 256), strides=(2, 2, 2, 1))
        channels = self.feature_channels
        blocks: list[nn.Module] = []
        for _ in range((32 // output_stride).bit_length() - 1):
            blocks.append(UpBlock(channels, channels // 2))
            channels //= 2
        self.decoder = nn.Sequential(*blocks)
        self.gather = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.out_channels = channels
        initialize(self)
        if pretrained is not None:
            part = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.")
            load_pretrained(
                self, pretrained, owner="FCNResNet50", model="resnet50", part=part, left_out=("layer4.", "fc.")
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return the representation of a batch of images."""
        representation: Tensor = self.gather(self.decoder(super().forward(images)))
        return representation
