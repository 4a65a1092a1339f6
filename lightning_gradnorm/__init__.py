"""Loss balancing for Lightning: GradNorm, and every other strategy, as a callback."""

from lightning_gradnorm.callbacks import FixedWeights, GradNorm
from lightning_gradnorm.module import MultiTaskModule
from lightning_gradnorm.tasks import Task

__all__ = ["FixedWeights", "GradNorm", "MultiTaskModule", "Task"]

__version__ = "0.1.0.dev0"
