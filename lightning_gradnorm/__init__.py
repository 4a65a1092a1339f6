"""Loss balancing for Lightning: GradNorm, and every other strategy, as a callback."""

from lightning_gradnorm import _moved
from lightning_gradnorm.callbacks import (
    Aggregation,
    FixedWeights,
    GradNorm,
    GradNormStatic,
    RandomWeights,
    Scalarization,
)
from lightning_gradnorm.engine.balancer import Balancer
from lightning_gradnorm.gradients import gradient_norms
from lightning_gradnorm.monitor import GradientNormMonitor
from lightning_gradnorm.multitask import MultiTaskModule, Task

__all__ = [
    "Aggregation",
    "Balancer",
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

_moved.install()
