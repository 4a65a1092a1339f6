"""Loss balancing for Lightning: GradNorm, and every other strategy, as a callback."""

from lightning_gradnorm.callbacks import (
    Aggregation,
    FixedWeights,
    GradNorm,
    GradNormStatic,
    RandomWeights,
    Scalarization,
)
from lightning_gradnorm.module import MultiTaskModule
from lightning_gradnorm.tasks import Task

__all__ = [
    "Aggregation",
    "FixedWeights",
    "GradNorm",
    "GradNormStatic",
    "MultiTaskModule",
    "RandomWeights",
    "Scalarization",
    "Task",
]

__version__ = "0.1.0.dev0"
