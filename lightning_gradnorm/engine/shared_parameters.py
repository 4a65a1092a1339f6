"""The task gradients of all shared parameters: the textbook's aggregation, with T passes through the trunk."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_gradnorm.engine.measurement import Setting
from lightning_gradnorm.engine.ranks import Ranks
from lightning_gradnorm.engine.step_state import OptimizerStepState
from lightning_gradnorm.gradients import JointGradients, WeightGradients, reason_not_retraversable


class SharedParameters:
    """Reads the task gradients of the parameters behind the representation, and sets one gradient in place of their sum.

    Args:
        setting: where the aggregation is at work.
        gate: where the task gradients meet; it lets none of them through to the trunk.
        on_cpu: the ranks in a group that may be used within backward.
    """

    def __init__(self, setting: Setting, gate: JointGradients, on_cpu: Ranks) -> None:
        self._setting = setting
        self._gate = gate
        self._on_cpu = on_cpu
        self._reader: WeightGradients | None = None
        self._size = 1.0
        self.has_read = False
        """Whether gradients wait for the optimizer step."""

    def find_parameters(self) -> None:
        """Find, before a backward pass, the parameters behind the representation: on any rank, now or in earlier passes.

        They keep the model's order. A layer may be skipped in some passes, or be frozen at first.

        Raises:
            ValueError: the trunk cannot be traversed once for each task.
        """
        caller = self._setting.caller
        if self._reader is None and (cause := reason_not_retraversable(self._gate.trunk_nodes())):
            raise ValueError(
                f"{caller}: at='parameters' traverses the trunk once for each task, and so comes to {cause.split(',')[0]}"
                f"{'' if cause.endswith('False.') else ', whose graph cannot be walked twice.'} Or use at='representation'."
            )
        before = [] if self._reader is None else self._reader.targets
        known = {id(parameter) for parameter in [*self._gate.trunk_parameters(), *before]}
        parameters = [parameter for parameter in self._setting.model.parameters() if parameter.requires_grad]
        counts = self._on_cpu.sum(torch.tensor([float(id(parameter) in known) for parameter in parameters]))
        shared = [parameter for parameter, count in zip(parameters, counts.tolist(), strict=True) if count]
        if self._reader is not None:
            self._reader.set_targets(shared)
        elif shared:
            self._reader = WeightGradients(shared)

    def read(self) -> None:
        """Traverse the trunk once for each task whose gradient has reached the representation. Called within backward."""
        if self._reader is not None:  # else all of the trunk is frozen
            self._gate.read_trunk_gradients(self._reader)
            self.has_read = True

    def reset(self) -> None:
        """Forget what was read: a new optimizer step begins."""
        self.has_read = False
        if self._reader is not None:
            self._reader.reset()

    def matrix(self, step: OptimizerStepState, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return J of shape (T, n), gradients of the step's mean losses over all ranks, and which tasks were present, (T,)."""
        loop, tasks = self._setting.loop, self._setting.tasks
        counts = torch.tensor([float(step.counts.get(task, 0)) for task in tasks])
        rows = like.new_zeros(len(tasks), 0) if self._reader is None else self._reader.rows(tasks, like)
        table = loop.ranks.sum(torch.cat([counts.to(rows)[:, None], rows], dim=1))
        # By how much .grad exceeds the gradient of the mean loss. The loss scale has been taken out of it already.
        self._size = float(loop.step_scale(step.backwards)) / loop.loss_scale()
        scale = loop.ranks.size * loop.loss_scale() * (self._size or 1.0)
        return table[:, 1:] / scale, (table[:, 0] > 0).cpu()

    def set_gradient(self, gradient: Tensor) -> None:
        """Add a gradient, shape (n,), to what the parameters have from elsewhere than the tasks."""
        start = 0
        for parameter in [] if self._reader is None else self._reader.targets:
            piece = gradient[start : start + parameter.numel()].view(parameter.shape).to(parameter.dtype) * self._size
            parameter.grad = piece.clone() if parameter.grad is None else parameter.grad.add_(piece)
            start += parameter.numel()
