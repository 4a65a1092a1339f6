"""The gradients of all shared parameters, task by task: the textbook's aggregation, T passes through the trunk."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor, nn

from lightning_gradnorm.engine.loss_scale import loss_scale, share
from lightning_gradnorm.engine.ranks import SideChannel
from lightning_gradnorm.engine.step_state import Window
from lightning_gradnorm.gradients import JointGradients, WeightGradients, unwalkable


class SharedParameters:
    """Reads the tasks' gradients of the parameters behind the representation, and hands in one in place of their sum.

    Args:
        asked_by: the callback's name, the beginning of each error.
        joint: where the tasks' gradients meet; it lets none of them through to the trunk.
        side: through which the ranks agree.
    """

    def __init__(self, asked_by: str, joint: JointGradients, side: SideChannel) -> None:
        self._asked_by = asked_by
        self._joint = joint
        self._side = side
        self._reader: WeightGradients | None = None
        self._size = 1.0

    def seek(self, module: nn.Module) -> None:
        """Look, before a backward pass, which parameters are behind the representation: on any rank, this time or before.

        They are the module's, in its order: a layer may be left out at times, or be frozen at first.

        Raises:
            ValueError: the trunk cannot be passed once for each task.
        """
        if self._reader is None and (cause := unwalkable(self._joint.trunk())):
            raise ValueError(
                f"{self._asked_by}: at='parameters' passes the trunk once for each task, and so comes to {cause.split(',')[0]}"
                f"{'' if cause.endswith('False.') else ', whose graph cannot be walked twice.'} Or use at='representation'."
            )
        before = [] if self._reader is None else self._reader.sought
        known = {id(parameter) for parameter in [*self._joint.parameters(), *before]}
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        counts = self._side.sum(torch.tensor([float(id(parameter) in known) for parameter in parameters]))
        shared = [parameter for parameter, count in zip(parameters, counts.tolist(), strict=True) if count]
        if self._reader is not None:
            self._reader.seek(shared)
        elif shared:
            self._reader = WeightGradients(shared)

    def read(self) -> None:
        """Pass the trunk once for each task whose gradient has arrived at the representation. Called within backward."""
        if self._reader is not None:  # else all of the trunk is frozen
            self._joint.gradients_of(self._reader)

    def clear(self) -> None:
        """Forget what was read: a new optimizer step begins."""
        if self._reader is not None:
            self._reader.clear()

    def matrix(self, tasks: Sequence[str], window: Window, like: Tensor, trainer: L.Trainer) -> tuple[Tensor, Tensor]:
        """Return J of shape (T, n), gradients of the step's mean losses over all ranks, and which tasks were present, (T,)."""
        counts = torch.tensor([float(window.counts.get(task, 0)) for task in tasks])
        rows = like.new_zeros(len(tasks), 0) if self._reader is None else self._reader.rows(tasks, like)
        table = torch.cat([counts.to(rows)[:, None], rows], dim=1)
        if trainer.world_size > 1:
            table = trainer.strategy.reduce(table, reduce_op="sum")
        # What stands in .grad is so much more than the gradient of the mean loss, the loss scale taken out already.
        self._size = share(window.backwards, trainer)
        scale = trainer.world_size * loss_scale(trainer) * (self._size or 1.0)
        return table[:, 1:] / scale, (table[:, 0] > 0).cpu()

    def hand_in(self, gradient: Tensor) -> None:
        """Add a gradient, shape (n,), to what the parameters have from elsewhere than the tasks."""
        start = 0
        for parameter in [] if self._reader is None else self._reader.sought:
            piece = gradient[start : start + parameter.numel()].view(parameter.shape).to(parameter.dtype) * self._size
            parameter.grad = piece.clone() if parameter.grad is None else parameter.grad.add_(piece)
            start += parameter.numel()
