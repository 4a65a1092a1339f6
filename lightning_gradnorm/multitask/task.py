"""A task: a head, the loss it is trained on, and the metrics it is evaluated by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_gradnorm._messages import kind_of

Loss = nn.Module | Callable[[Tensor, Tensor], Tensor]


def adam(parameters: Iterable[nn.Parameter], lr: float = 1e-3) -> torch.optim.Optimizer:
    """Return the default optimizer of `MultiTaskModule`. It is a function so that LightningCLI can write it to a config."""
    return torch.optim.Adam(parameters, lr=lr)


class Task(nn.Module):
    """One task of a `MultiTaskModule`.

    Args:
        head: module from the representation to the prediction.
        loss: function or module from (prediction, target) to a scalar.
        metrics: a metric of torchmetrics, or several by name; each is updated with (prediction, target).

    Raises:
        TypeError: an argument has the wrong type.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> seg = Task(nn.Linear(16, 10), nn.CrossEntropyLoss(), metrics={"accuracy": MulticlassAccuracy(num_classes=10)})
        >>> sorted(seg.metrics)
        ['accuracy']
    """

    def __init__(
        self, head: nn.Module, loss: Loss, metrics: Metric | MetricCollection | Mapping[str, Metric] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(head, nn.Module):
            raise TypeError(f"Task: head should be a module; got {kind_of(head)}")
        if isinstance(loss, type) or not callable(loss):
            hint = f". Give an object of it: {loss.__name__}()" if isinstance(loss, type) else ""
            raise TypeError(f"Task: loss should be a function of (prediction, target); got {kind_of(loss)}{hint}")
        self.head = head
        self.loss = loss
        self.metrics = _by_name(metrics)


def _by_name(metrics: Metric | MetricCollection | Mapping[str, Metric] | None) -> dict[str, Metric]:
    """Return the metrics by name. They are templates: a `MultiTaskModule` clones them for validation and test."""
    if isinstance(metrics, Metric):
        return {type(metrics).__name__.lower(): metrics}
    if not (metrics is None or isinstance(metrics, Mapping | MetricCollection)):
        expected = "a torchmetrics.Metric, or a mapping from name to Metric"
        raise TypeError(f"Task: metrics should be {expected}; got {kind_of(metrics)}")
    found = dict(metrics.items() if metrics is not None else {})
    for name, metric in found.items():
        if not isinstance(metric, Metric):
            raise TypeError(f"Task: metrics['{name}'] should be a torchmetrics.Metric; got {kind_of(metric)}")
    return found
