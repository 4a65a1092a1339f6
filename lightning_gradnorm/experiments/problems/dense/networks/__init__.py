"""Shared image encoders, and heads. Any other ``torch.nn.Module`` works, too."""

from lightning_gradnorm.experiments.problems.dense.networks.dilated_resnet import DilatedResNet50
from lightning_gradnorm.experiments.problems.dense.networks.fcn_resnet import FCNResNet50
from lightning_gradnorm.experiments.problems.dense.networks.heads import ConvHead, DeepLabHead
from lightning_gradnorm.experiments.problems.dense.networks.segnet import SegNet

__all__ = [
    "ConvHead",
    "DeepLabHead",
    "DilatedResNet50",
    "FCNResNet50",
    "SegNet",
]
