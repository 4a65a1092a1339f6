"""Regression tasks with linear heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchmetrics.regression import MeanSquaredError, R2Score

from lightning_gradnorm.multitask import Task


def regression_tasks(names: int | Sequence[str], in_features: int, out_features: int = 1) -> dict[str, Task]:
    """Return regression tasks with a linear head, the squared loss, and R² and mean squared error as metrics.

    Args:
        names: names of the tasks, or a number T for ``task_0`` … ``task_{T−1}``.
        in_features: size of the representation.
        out_features: size of each prediction.

    Example:
        >>> list(regression_tasks(3, in_features=100, out_features=100))
        ['task_0', 'task_1', 'task_2']
    """
    if isinstance(names, int):
        names = [f"task_{i}" for i in range(names)]
    return {
        name: Task(
            nn.Linear(in_features, out_features),
            nn.MSELoss(),
            {"r2": R2Score(multioutput="variance_weighted"), "mse": MeanSquaredError()},
        )
        for name in names
    }
