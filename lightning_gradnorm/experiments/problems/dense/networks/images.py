"""Preprocessing of images before the first layer of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ImageNetInput(nn.Module):
    """Checks a batch of RGB images, and standardizes each channel with ImageNet's statistics, as for pretrained weights.

    The mean and standard deviation are not in the state dict, so its names match torchvision's.

    Args:
        owner: Name of the network, for error messages.
        smallest: Minimum height and width, in pixels.
        multiple: Height and width must be multiples of this.
        standardize: ``False`` leaves the values unchanged.

    Raises:
        ValueError: In ``forward``, if the images have the wrong type, shape or size.

    Shape: ``(batch, 3, height, width)``, floats in [0, 1], to the same.

    Example:
        >>> ImageNetInput("SegNet")(torch.full((1, 3, 1, 1), 0.5)).flatten()
        tensor([0.0655, 0.1964, 0.4178])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, owner: str, smallest: int = 1, multiple: int = 1, standardize: bool = True) -> None:
        super().__init__()
        self.owner = owner
        self.smallest = smallest
        self.multiple = multiple
        self.standardize = standardize
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the images, standardized."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"{self.owner}: images should be floats in [0, 1] of shape (batch, 3, height, width); got {images.dtype} "
                f"of shape {tuple(images.shape)}."
            )
        height, width = images.shape[-2:]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"{self.owner}: height and width should be {self.smallest} or more, or nothing is left to decode; got "
                f"{height} × {width}."
            )
        if height % self.multiple or width % self.multiple:
            fits = " × ".join(str(-(-side // self.multiple) * self.multiple) for side in (height, width))
            raise ValueError(
                f"{self.owner}: height and width should be multiples of {self.multiple}, so the upsampled output aligns "
                f"with the image; got {height} × {width}. Resize or pad the images, for example to {fits}."
            )
        return (images - self.mean) / self.std if self.standardize else images
