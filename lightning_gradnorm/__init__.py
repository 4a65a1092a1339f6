"""Loss balancing for Lightning: GradNorm, and every other strategy, as a callback."""

from lightning_gradnorm.callbacks import (
    Aggregation,
    FixedWeights,
    GradientNormMonitor,
    GradNorm,
    GradNormStatic,
    RandomWeights,
    Scalarization,
)
from lightning_gradnorm.gradients import gradient_norms
from lightning_gradnorm.module import MultiTaskModule
from lightning_gradnorm.tasks import Task

__all__ = [
    "Aggregation",
    "FixedWeights",
    "GradNorm",
    "GradNormStatic",
    "GradientNormMonitor",
    "MultiTaskModule",
    "RandomWeights",
    "Scalarization",
    "Task",
    "gradient_norms",
]

__version__ = "0.1.0.dev0"
