"""Encoders that tasks share, and heads; any ``torch.nn.Module`` does as well."""

from lightning_gradnorm.networks.conv import ConvEncoder
from lightning_gradnorm.networks.dilated_resnet import DilatedResNet50
from lightning_gradnorm.networks.engine import EngineEncoder, health_head, rul_head
from lightning_gradnorm.networks.fcn_resnet import FCNResNet50
from lightning_gradnorm.networks.heads import ConvHead, DeepLabHead
from lightning_gradnorm.networks.mlp import MLP
from lightning_gradnorm.networks.segnet import SegNet

__all__ = [
    "MLP",
    "ConvEncoder",
    "ConvHead",
    "DeepLabHead",
    "DilatedResNet50",
    "EngineEncoder",
    "FCNResNet50",
    "SegNet",
    "health_head",
    "rul_head",
]
