"""torchvision's names and shapes for VGG16 and ResNet-50, taken from its documentation, and their computations.

`state_dict` creates such a dict with random numbers; `vgg16_features` and `resnet50_features` are plain functions of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Shapes = dict[str, tuple[int, ...]]

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
VGG16_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
VGG16_BN_CONVOLUTIONS = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)


def _batch_norm(name: str, channels: int) -> Shapes:
    of_channels = {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean", "running_var")}
    return {**of_channels, f"{name}.num_batches_tracked": ()}


def vgg16(batch_norm: bool) -> Shapes:
    """Names and shapes of `vgg16` or `vgg16_bn`, classifier included."""
    shapes: Shapes = {}
    channels_in = 3
    channels = [c for c in VGG16 if isinstance(c, int)]
    for index, channels_out in zip(VGG16_BN_CONVOLUTIONS if batch_norm else VGG16_CONVOLUTIONS, channels, strict=True):
        shapes[f"features.{index}.weight"] = (channels_out, channels_in, 3, 3)
        shapes[f"features.{index}.bias"] = (channels_out,)
        if batch_norm:
            shapes |= _batch_norm(f"features.{index + 1}", channels_out)
        channels_in = channels_out
    for index, (features_in, features_out) in {0: (25088, 4096), 3: (4096, 4096), 6: (4096, 1000)}.items():
        shapes |= {
            f"classifier.{index}.weight": (features_out, features_in),
            f"classifier.{index}.bias": (features_out,),
        }
    return shapes


def resnet50() -> Shapes:
    """Names and shapes of `resnet50`, classifier included."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **_batch_norm("bn1", 64)}
    channels_in = 64
    for layer, (blocks, middle) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            shapes |= {f"{name}.conv1.weight": (middle, channels_in, 1, 1), **_batch_norm(f"{name}.bn1", middle)}
            shapes |= {f"{name}.conv2.weight": (middle, middle, 3, 3), **_batch_norm(f"{name}.bn2", middle)}
            shapes |= {f"{name}.conv3.weight": (4 * middle, middle, 1, 1), **_batch_norm(f"{name}.bn3", 4 * middle)}
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * middle, channels_in, 1, 1)
                shapes |= _batch_norm(f"{name}.downsample.1", 4 * middle)
            channels_in = 4 * middle
    return {**shapes, "fc.weight": (1000, 2048), "fc.bias": (1000,)}


def state_dict(shapes: Shapes, scale: float = 1.0) -> dict[str, Tensor]:
    """Random numbers under these names; convolutions preserve the scale of their input."""
    values: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        if name.startswith(("classifier.", "fc.")):
            values[name] = torch.zeros(1).expand(shape)  # hundreds of megabytes that nobody reads
        elif name.endswith("num_batches_tracked"):
            values[name] = torch.tensor(7)
        elif len(shape) == 4:
            values[name] = torch.randn(shape) * scale * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif name.endswith("running_var") or (name.endswith("weight") and len(shape) == 1):
            values[name] = torch.rand(shape) + 0.5
        else:
            values[name] = 0.1 * torch.randn(shape)
    return values


def _normalized(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{key}"].view(-1, 1, 1) for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def vgg16_features(state: dict[str, Tensor], x: Tensor, batch_norm: bool) -> Tensor:
    """What VGG16 makes of images before its classifier, in evaluation."""
    indices = iter(VGG16_BN_CONVOLUTIONS if batch_norm else VGG16_CONVOLUTIONS)
    for layer in VGG16:
        if layer == "M":
            x = F.max_pool2d(x, 2)
            continue
        index = next(indices)
        x = F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1)
        x = F.relu(_normalized(x, state, f"features.{index + 1}") if batch_norm else x)
    return x


def resnet50_features(
    state: dict[str, Tensor], x: Tensor, strides: Sequence[int], dilations: Sequence[Sequence[int]]
) -> Tensor:
    """What ResNet-50 makes of images before its classifier, in evaluation.

    Args:
        state: Weights; as many stages are run as it has strides for.
        x: Images.
        strides: Stride of the first 3 x 3 convolution of each stage.
        dilations: For each stage, the dilation of its first 3 x 3 convolution and of the others.
    """
    x = F.relu(_normalized(F.conv2d(x, state["conv1.weight"], stride=2, padding=3), state, "bn1"))
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    for layer, (stride_of_first, (first, others)) in enumerate(zip(strides, dilations, strict=True), start=1):
        block = 0
        while f"layer{layer}.{block}.conv1.weight" in state:
            name = f"layer{layer}.{block}"
            stride, dilation = (stride_of_first, first) if block == 0 else (1, others)
            shortcut = x
            if f"{name}.downsample.0.weight" in state:
                shortcut = F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride)
                shortcut = _normalized(shortcut, state, f"{name}.downsample.1")
            x = F.relu(_normalized(F.conv2d(x, state[f"{name}.conv1.weight"]), state, f"{name}.bn1"))
            x = F.conv2d(x, state[f"{name}.conv2.weight"], stride=stride, padding=dilation, dilation=dilation)
            x = F.relu(_normalized(x, state, f"{name}.bn2"))
            x = _normalized(F.conv2d(x, state[f"{name}.conv3.weight"]), state, f"{name}.bn3")
            x = F.relu(x + shortcut)
            block += 1
    return x
