"""How each task's gradient is read out of one backward pass. Pure torch."""

from lightning_gradnorm.gradients.branch import TAKEN, branch, fan_out
from lightning_gradnorm.gradients.buffers import KeptBuffers
from lightning_gradnorm.gradients.joint import JointGradients
from lightning_gradnorm.gradients.paths import nodes_between, unwalkable
from lightning_gradnorm.gradients.readers import ActivationGradients, GradientReader, RowReader, WeightGradients
from lightning_gradnorm.gradients.replay import ReplayedGradients

__all__ = [
    "TAKEN",
    "ActivationGradients",
    "GradientReader",
    "JointGradients",
    "KeptBuffers",
    "ReplayedGradients",
    "RowReader",
    "WeightGradients",
    "branch",
    "fan_out",
    "nodes_between",
    "unwalkable",
]
