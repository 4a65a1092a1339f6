"""The width of a network and its weight initialization."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lightning_gradnorm._messages import check, is_number


def check_width(owner: str, width: float, pretrained: str | Path | None) -> None:
    """Check that ``width`` gives integer numbers of channels, and is 1 for pretrained weights.

    Raises:
        ValueError: It does not.

    Example:
        >>> check_width("SegNet", 0.3, None)
        Traceback (most recent call last):
        ValueError: SegNet: width should be a positive multiple of 1/16; got 0.3
    """
    is_multiple = is_number(width) and width > 0 and float(width * 16).is_integer()
    check(owner, is_multiple, "width", "a positive multiple of 1/16", width)
    check(owner, pretrained is None or width == 1, "width", "1 for pretrained weights", width)


def initialize(network: nn.Module) -> None:
    """Initialize all convolutions with He et al.'s rule for ReLU (arXiv 1502.01852), and biases with zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
