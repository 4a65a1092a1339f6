"""Mean losses and metrics by task, over an epoch of validation or test."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from typing_extensions import override

from lightning_gradnorm.engine.ranks import Ranks
from lightning_gradnorm.multitask.task import Task


class MeanLoss(Metric):
    """The mean of the batches' losses, weighted by batch size; NaN stays NaN.

    torchmetrics' `MeanMetric` drops NaN; if it does not, it drops the weights.
    """

    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "samples"):
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    @override
    def update(self, loss: Tensor, batch_size: int) -> None:
        self.total = self.total + loss.detach() * batch_size
        self.samples = self.samples + batch_size

    @override
    def compute(self) -> Tensor:
        return self.total / self.samples


class Evaluation(nn.Module):
    """Accumulates losses and metrics batch by batch, so all ranks compute them once per epoch, in the same order.

    A rank may have no targets of a task. If metrics were logged in each batch, the other ranks would wait for it forever.

    Args:
        tasks: `Task` by name; their metrics are cloned.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.total = MeanLoss()
        self.losses = nn.ModuleDict({name: MeanLoss() for name in tasks})
        self.metrics = nn.ModuleDict(
            {
                name: nn.ModuleDict({metric: pattern.clone() for metric, pattern in task.metrics.items()})
                for name, task in tasks.items()
            }
        )

    def update(
        self, predictions: Mapping[str, Any], losses: Mapping[str, Tensor], targets: Mapping[str, Any], batch_size: int
    ) -> None:
        """Add a batch, by task; only tasks that are present."""
        if losses:
            self.total.update(torch.stack([loss.reshape(()) for loss in losses.values()]).sum(), batch_size)
        for name, loss in losses.items():
            self._loss(name).update(loss.reshape(()), batch_size)
            for metric in self._metrics(name).values():
                metric.update(predictions[name], targets[name])

    def compute(self) -> dict[str, Any]:
        """Return ``loss``, ``loss/<task>`` and ``<metric>/<task>`` of all tasks seen on any rank, equal on all ranks."""
        here = torch.tensor([self._loss(name).update_count for name in self.losses], device=self.total.device)
        had = Ranks.current().sum(here).tolist()
        found: dict[str, Metric] = {"loss": self.total} if any(had) else {}
        for name, count in zip(self.losses, had, strict=True):
            if count:
                found |= {f"loss/{name}": self._loss(name)}
                found |= {f"{metric}/{name}": one for metric, one in self._metrics(name).items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")  # a rank without the task
            return {name: metric.compute() for name, metric in found.items()}

    def reset(self) -> None:
        """Forget the last epoch, even if it was interrupted."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()

    def _loss(self, task: str) -> MeanLoss:
        return cast(MeanLoss, self.losses[task])

    def _metrics(self, task: str) -> dict[str, Metric]:
        return dict(cast("nn.ModuleDict", self.metrics[task]).items())  # type: ignore[arg-type]
