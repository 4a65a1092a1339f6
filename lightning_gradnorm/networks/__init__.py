"""Encoders that tasks share; any ``torch.nn.Module`` does as well."""

from lightning_gradnorm.networks.conv import ConvEncoder
from lightning_gradnorm.networks.mlp import MLP

__all__ = ["MLP", "ConvEncoder"]
