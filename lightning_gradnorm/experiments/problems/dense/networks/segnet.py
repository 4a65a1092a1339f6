"""SegNet on VGG16, up to the resolution of the predictions."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_gradnorm._messages import check
from lightning_gradnorm.experiments.problems.dense.networks.images import ImageNetInput
from lightning_gradnorm.experiments.problems.dense.networks.pretrained import load_pretrained
from lightning_gradnorm.experiments.problems.dense.networks.widths import check_width, initialize

# Channels of VGG16's convolutions (configuration D of Simonyan and Zisserman). Each stage ends with a pooling.
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

_check = partial(check, "SegNet")


class SegNet(nn.Module):
    """VGG16's 13 convolutions and a mirrored decoder that unpools to the position of each maximum.

    A stage of the encoder has two or three 3 x 3 convolutions and a 2 x 2 max pooling. The matching stage of the decoder
    puts every value back where the pooling took it from, with zeros elsewhere, and has as many convolutions, the last one
    to the channels of the previous stage. The decoder stops at ``1/output_stride`` of the image. All of it is shared:
    tasks add one layer each (`ConvHead`), and the last convolution of the decoder is the last shared layer.

    With ``output_stride=4``, 320 x 320 to 80 x 80, the decoder has the three deepest of its five stages, and the network
    29.2 million parameters; the paper has 29. (The two omitted stages have few channels: the whole network,
    ``output_stride=1``, has 29.4 million.)

    Sources: Badrinarayanan et al., SegNet, TPAMI 2017 (arXiv 1511.00561); Lee et al., RoomNet, ICCV 2017; Chen et al.,
    GradNorm, ICML 2018, section 5. SegNet uses batch normalization after each convolution. The GradNorm paper does not
    say if it does.

    Args:
        output_stride: Image pixels per pixel of the representation: 1, 2, 4, 8 or 16.
        batch_norm: Normalize after each convolution.
        width: Factor on all channels, a multiple of 1/16: 0.25 for a network with a sixteenth of the parameters.
        pretrained: File with the state dict of torchvision's ``vgg16_bn`` (``vgg16`` without ``batch_norm``). The
            convolutions of the encoder are loaded, the classifier is not. ``None`` initializes all weights randomly.
        standardize: Subtract ImageNet's mean from the images and divide by its standard deviation.

    Raises:
        ValueError: An argument is out of range, the weights belong to another network, or a side has fewer than 32 pixels.
        FileNotFoundError: ``pretrained`` does not exist.

    Shape: ``(batch, 3, height, width)``, floats in [0, 1], height and width 32 or more, to
    ``(batch, segnet.out_channels, height // output_stride, width // output_stride)``.

    The state dict has torchvision's names for the encoder, ``features.0.weight`` and so on.

    Example:
        >>> trunk = SegNet(width=0.25)
        >>> trunk(torch.zeros(2, 3, 64, 96)).shape, trunk.out_channels
        (torch.Size([2, 32, 16, 24]), 32)
    """

    def __init__(
        self,
        output_stride: int = 4,
        batch_norm: bool = True,
        width: float = 1.0,
        pretrained: str | Path | None = None,
        standardize: bool = True,
    ) -> None:
        super().__init__()
        _check(output_stride in (1, 2, 4, 8, 16), "output_stride", "1, 2, 4, 8 or 16", output_stride)
        check_width("SegNet", width, pretrained)
        stages = [[round(channels * width) for channels in stage] for stage in _STAGES]
        self.input = ImageNetInput("SegNet", smallest=2 ** len(stages), standardize=standardize)

        encoder: list[nn.Module] = []
        for channels_in, stage in zip([3, *(stage[-1] for stage in stages)], stages, strict=False):
            # Biases have no effect before a normalization, but torchvision's VGG has them.
            encoder += _convolutions([channels_in, *stage], batch_norm, bias=True)
            encoder += [nn.MaxPool2d(2, return_indices=True)]
        self.features = nn.Sequential(*encoder)

        self.decoder = nn.ModuleList()
        for depth in range(len(stages) - 1, output_stride.bit_length() - 2, -1):
            below = stages[depth - 1][-1] if depth > 0 else stages[0][0]
            backwards = [*reversed(stages[depth]), below]
            self.decoder.append(nn.Sequential(*_convolutions(backwards, batch_norm, bias=not batch_norm)))
        self.out_channels = below
        # Not in place, because code that runs the last shared layer again needs its unchanged output.
        self.decoder[-1][-1] = nn.ReLU()  # type: ignore[operator]

        initialize(self)
        if pretrained is not None:
            model = "vgg16_bn" if batch_norm else "vgg16"
            load_pretrained(
                self, pretrained, owner="SegNet", model=model, part=("features.",), left_out=("classifier.",)
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return the representation of a batch of images."""
        x = self.input(images)
        poolings: list[tuple[Tensor, torch.Size]] = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                size = x.shape[-2:]
                x, taken_from = layer(x)
                poolings.append((taken_from, size))
            else:
                x = layer(x)
        for stage in self.decoder:
            x = stage(unpool(x, *poolings.pop()))
        representation: Tensor = x
        return representation


def unpool(x: Tensor, taken_from: Tensor, size: torch.Size) -> Tensor:
    """Put the results of a max pooling back to their original positions, with zeros elsewhere.

    Like `torch.nn.functional.max_unpool2d`, but deterministic on a GPU. No two values collide, because the pooling windows
    do not overlap.

    Args:
        x: One value per window, shape ``(batch, channels, h, w)``.
        taken_from: Position of each value in its plane of ``size``, from `torch.nn.MaxPool2d`.
        size: Height and width before the pooling.

    Example:
        >>> pooled, taken_from = nn.MaxPool2d(2, return_indices=True)(torch.tensor([[[[1.0, 5.0], [2.0, 3.0]]]]))
        >>> unpool(pooled, taken_from, torch.Size([2, 2]))
        tensor([[[[0., 5.],
                  [0., 0.]]]])
    """
    empty = x.new_zeros((*x.shape[:2], size.numel()))
    return empty.scatter(2, taken_from.flatten(2), x.flatten(2)).view(*x.shape[:2], *size)


def _convolutions(channels: list[int], batch_norm: bool, bias: bool) -> list[nn.Module]:
    """Return 3 x 3 convolutions from each number of channels to the next."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in pairwise(channels):
        layers.append(nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias))
        layers += [nn.BatchNorm2d(channels_out)] if batch_norm else []
        layers.append(nn.ReLU(inplace=True))
    return layers
