"""A physics-informed network as a LightningModule. Balancing callbacks work with it like with any other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm.callbacks.logging import is_logged_step
from lightning_gradnorm.experiments.problems.pde.equation import Equation
from lightning_gradnorm.experiments.problems.pde.metrics import RelativeL2
from lightning_gradnorm.multitask.evaluation import MeanLoss
from lightning_gradnorm.multitask.task import adam

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


class PINN(L.LightningModule):
    """A network trained to satisfy a differential equation and its conditions: one loss for each, no heads.

    It uses automatic optimization, so optimizers with a closure such as LBFGS work as in any LightningModule. Its
    ``training_step`` returns the losses by task and their plain sum. It declares its tasks, so a callback
    without ``tasks`` balances all of them: ``GradNorm()`` at the last layer, ``Aggregation(…, at="parameters")``.

    Args:
        equation: The equation to satisfy.
        network: Maps points ``(n, d)`` to the solution ``(n, 1)``.
        optimizer: Creates the optimizer from the parameters.
        lr_scheduler: Creates the scheduler from the optimizer. It steps after each optimizer step.

    Logs ``train/loss``, ``train/loss/<task>``, ``val/loss``, ``val/loss/<task>``, ``val/relative_l2`` and the same for
    ``test``; ``loss`` is the plain sum over the tasks.

    Source: Raissi, Perdikaris, Karniadakis, Physics-informed neural networks, J. Comput. Phys. 378, 2019.

    Example:
        >>> from lightning_gradnorm.experiments.problems.pde import Poisson, TanhMLP
        >>> model = PINN(Poisson(), TanhMLP(Poisson(), hidden=[8]))
        >>> points = {"pde": torch.rand(4, 1), "boundary": torch.tensor([[-1.0], [1.0]])}
        >>> list(model.training_step(points, 0))
        ['loss', 'pde', 'boundary']
    """

    def __init__(
        self,
        equation: Equation,
        network: nn.Module,
        optimizer: OptimizerFactory = adam,
        lr_scheduler: SchedulerFactory | None = None,
    ) -> None:
        super().__init__()
        self.equation = equation
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        for stage in ("val", "test"):
            losses = {f"loss/{task}": MeanLoss() for task in equation.tasks}
            self.add_module(f"{stage}_evaluation", nn.ModuleDict({"relative_l2": RelativeL2(), **losses}))

    @property
    def tasks(self) -> tuple[str, ...]:
        """The equation's tasks."""
        return self.equation.tasks

    @property
    def metric_names(self) -> dict[str, list[str]]:
        """Task → its metrics besides the loss: none, because the relative L2 error belongs to the whole solution."""
        return {task: [] for task in self.tasks}

    @property
    def task_heads(self) -> dict[str, str]:
        """Task → the network that produces all losses, for balancing callbacks."""
        return dict.fromkeys(self.tasks, "network")

    def task_losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of each task at its points."""
        return self.equation.losses(self.network, batch)

    @override
    def forward(self, points: Tensor) -> Tensor:
        """Return the solution at the points."""
        values: Tensor = self.network(points)
        return values

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        losses = self.task_losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        if self._trainer is not None and is_logged_step(self.trainer):
            shown = {"train/loss": loss} | {f"train/loss/{task}": one for task, one in losses.items()}
            self.log_dict({name: one.detach() for name, one in shown.items()}, batch_size=1)
        return {"loss": loss, **losses}

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @override
    def on_validation_epoch_start(self) -> None:
        self._reset("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._reset("test")

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate("val", batch)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._evaluate("test", batch)

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def _metrics(self, stage: str) -> dict[str, Any]:
        return dict(self.get_submodule(f"{stage}_evaluation").named_children())

    def _reset(self, stage: str) -> None:
        for metric in self._metrics(stage).values():
            metric.reset()

    def _evaluate(self, stage: str, batch: dict[str, Any]) -> None:
        metrics = self._metrics(stage)
        points, exact = batch["reference"]
        metrics["relative_l2"].update(self(points), exact)
        # Residuals are derivatives and need a graph. Inference mode does not allow one, nor one of tensors made in it.
        with torch.inference_mode(False), torch.enable_grad():
            losses = self.task_losses({task: batch[task].clone() for task in self.tasks})
        for task, loss in losses.items():
            metrics[f"loss/{task}"].update(loss, len(batch[task]))

    def _log_evaluation(self, stage: str) -> None:
        found = {name: metric.compute() for name, metric in self._metrics(stage).items()}
        loss = torch.stack([found[f"loss/{task}"] for task in self.tasks]).sum()
        # Equal on all ranks already; without sync_dist Lightning would warn.
        self.log_dict({f"{stage}/{name}": one for name, one in {"loss": loss, **found}.items()}, sync_dist=True)

    # ---- optimization ------------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.network.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }
