"""Our own module: one shared encoder, several task heads, manual optimization."""

from lightning_gradnorm.multitask.module import MultiTaskModule
from lightning_gradnorm.multitask.task import Task

__all__ = ["MultiTaskModule", "Task"]
