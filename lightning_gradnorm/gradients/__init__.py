"""Reads each task's gradient out of one backward pass. Pure torch."""

from lightning_gradnorm.gradients.branch import TAKEN, branch, branch_arguments, fan_out
from lightning_gradnorm.gradients.buffers import BufferGuard
from lightning_gradnorm.gradients.gate import JointGradients
from lightning_gradnorm.gradients.graph import nodes_on_paths, reason_not_retraversable
from lightning_gradnorm.gradients.loss_terms import REST, LossTermGradients
from lightning_gradnorm.gradients.norms import GradientNorms, check_loss, gradient_norms, inner_products
from lightning_gradnorm.gradients.readers import (
    ActivationGradients,
    GradientReader,
    Norm,
    RowReader,
    WeightGradients,
    flat_row,
    row_width,
)
from lightning_gradnorm.gradients.reading import TaskReading
from lightning_gradnorm.gradients.repeated_passes import RepeatedPasses
from lightning_gradnorm.gradients.replay import ReplayedGradients
from lightning_gradnorm.gradients.shared import SharedGradients

__all__ = [
    "REST",
    "TAKEN",
    "ActivationGradients",
    "BufferGuard",
    "GradientNorms",
    "GradientReader",
    "JointGradients",
    "LossTermGradients",
    "Norm",
    "RepeatedPasses",
    "ReplayedGradients",
    "RowReader",
    "SharedGradients",
    "TaskReading",
    "WeightGradients",
    "branch",
    "branch_arguments",
    "check_loss",
    "fan_out",
    "flat_row",
    "gradient_norms",
    "inner_products",
    "nodes_on_paths",
    "reason_not_retraversable",
    "row_width",
]
