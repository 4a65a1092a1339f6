"""Prints the numbers of parameters of the networks next to those in the papers: ``python scripts/network_sizes.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lightning_gradnorm.experiments.problems.dense.networks.dilated_resnet import DilatedResNet50
from lightning_gradnorm.experiments.problems.dense.networks.fcn_resnet import FCNResNet50
from lightning_gradnorm.experiments.problems.dense.networks.heads import ConvHead, DeepLabHead
from lightning_gradnorm.experiments.problems.dense.networks.segnet import SegNet
from lightning_gradnorm.experiments.problems.engines.network import EngineEncoder, health_head, rul_head

NYUV2_CHANNELS = {"segmentation": 13, "depth": 1, "normals": 3}


def count_parameters(module: nn.Module) -> int:
    """Return the number of values in all parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def size_table() -> str:
    """Return a table of the trunks and heads for NYUv2's three tasks and C-MAPSS's two, in millions of parameters.

    Example:
        >>> print(size_table())
        network                         shared    heads     paper
        SegNet on VGG16                29.18 M   0.00 M      29 M
        thin FCN on ResNet-50          15.40 M   0.00 M      15 M
        dilated ResNet-50, DeepLab     23.51 M  48.38 M         -
        CNN, BiLSTM, attention          3.49 M   0.01 M     3.5 M
    """
    rows = [f"{'network':28}{'shared':>10}{'heads':>9}{'paper':>10}"]
    with torch.device("meta"):  # only shapes, without initialization
        trunks: list[tuple[str, SegNet | FCNResNet50 | DilatedResNet50, type[ConvHead] | type[DeepLabHead], str]] = [
            ("SegNet on VGG16", SegNet(), ConvHead, "29 M"),
            ("thin FCN on ResNet-50", FCNResNet50(), ConvHead, "15 M"),
            ("dilated ResNet-50, DeepLab", DilatedResNet50(), DeepLabHead, "-"),
        ]
        for name, trunk, head, paper in trunks:
            heads = [head(trunk.out_channels, channels) for channels in NYUV2_CHANNELS.values()]
            rows.append(_row(name, trunk, heads, paper))
        rows.append(_row("CNN, BiLSTM, attention", EngineEncoder(), [rul_head(), health_head()], "3.5 M"))
    return "\n".join(rows)


def _row(name: str, trunk: nn.Module, heads: Sequence[nn.Module], paper: str) -> str:
    shared, own = (f"{sum(map(count_parameters, modules)) / 1e6:.2f} M" for modules in ([trunk], heads))
    return f"{name:28}{shared:>10}{own:>9}{paper:>10}"


if __name__ == "__main__":
    print(size_table())
