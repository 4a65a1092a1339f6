"""The tasks of C-MAPSS: an engine's remaining useful life, and its health."""

from __future__ import annotations

from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from lightning_gradnorm.experiments.problems.engines.losses import FailureBiasedMSE
from lightning_gradnorm.experiments.problems.engines.nasa_score import NASAScore
from lightning_gradnorm.experiments.problems.engines.network import health_head, rul_head
from lightning_gradnorm.multitask.task import Task


def engine_tasks(
    in_features: int = 32, weighted: bool = False, cap: float = 125.0, classes: int = 3
) -> dict[str, Task]:
    """Return the tasks ``rul``, a regression in cycles, and ``health``, a classification.

    Metrics of ``rul``: ``rmse``, ``mae`` and ``nasa_score``. Metrics of ``health``: ``accuracy`` over all windows, and ``f1``,
    the mean over the classes.

    Args:
        in_features: length of the representation.
        weighted: give windows near the failure more weight in the squared loss of ``rul``, twice at the failure itself; see
            `FailureBiasedMSE`. Part of AMNL.
        cap: the life in cycles from which on a window has weight 1 if ``weighted``. An untrained head predicts half of it.
        classes: number of health classes.

    Example:
        >>> {name: sorted(task.metrics) for name, task in engine_tasks().items()}
        {'rul': ['mae', 'nasa_score', 'rmse'], 'health': ['accuracy', 'f1']}
    """
    return {
        "rul": Task(
            rul_head(in_features, initial=cap / 2),
            FailureBiasedMSE(cap) if weighted else nn.MSELoss(),
            {"rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError(), "nasa_score": NASAScore()},
        ),
        "health": Task(
            health_head(in_features, classes),
            nn.CrossEntropyLoss(),
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            },
        ),
    }
