"""Feeds an aggregation with the task gradients, and replaces them by the one gradient that it returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_gradnorm.engine.layers import find_module
from lightning_gradnorm.engine.measurement import LossMeasurement, Setting
from lightning_gradnorm.engine.rule import GradientRule
from lightning_gradnorm.engine.step_state import BatchState, OptimizerStepState
from lightning_gradnorm.gradients import GradientReader, JointGradients


class RanksWeights:
    """Gets the weights λ from an aggregation, the same on all ranks.

    Args:
        rule: the aggregation.
        setting: the model and the loop it works on.
    """

    def __init__(self, rule: GradientRule, setting: Setting) -> None:
        self.rule = rule
        self.on_cpu = setting.loop.ranks.on_cpu(setting.options.get("timeout"))
        """The ranks, for sums in the middle of a backward pass."""

    def of(self, gramian: Tensor, present: Tensor, matrix: Tensor | None = None) -> Tensor:
        """Return rank 0's weights, zero for an absent task."""
        self.rule.weigh_gradients(gramian, present, matrix)
        weights = self.on_cpu.broadcast_from_rank0(self.rule.gradient_weights.cpu())
        self.rule.gradient_weights = weights.to(self.rule.gradient_weights)
        return self.kept(present)

    def kept(self, present: Tensor) -> Tensor:
        """Return the current weights, zero for an absent task."""
        return self.rule.gradient_weights * present.to(self.rule.gradient_weights)


class AtRepresentation(LossMeasurement[GradientRule]):
    """Aggregates task gradients where they meet in the backward pass.

    Args:
        rule: the aggregation.
        setting: the model and the loop it works on.
    """

    replaces_gradients = True

    def __init__(self, rule: GradientRule, setting: Setting) -> None:
        super().__init__(rule, setting)
        self.gramian: Tensor | None = None
        """``J Jᵀ`` of the last backward pass, over all ranks (for aggregations of the matrix: of this rank only)."""
        self._weights = RanksWeights(rule, setting)
        self._keeps_weights = False

    def candidates(self, W: Mapping[str, nn.Parameter], uncompiled: Collection[nn.Module]) -> list[GradientReader]:
        """Return the gate at the representation."""
        setting = self.setting
        try:
            encoder = find_module(setting.model, setting.representation, caller=f"{setting.caller}: representation")
        except ValueError as error:
            other = "of_parameters=True in the rule" if setting.caller == "Balancer" else "at='parameters'"
            cause = str(error) if str(error).endswith("?") else f"{error}."
            raise ValueError(
                f"{cause} This strategy combines the gradients at the output of one module, by default 'encoder'. Name the "
                f"module whose output the heads read, representation='trunk'; or combine those of the parameters: {other}."
            ) from None
        return [JointGradients(encoder, f"'{setting.representation}'", setting.tasks, self._combine)]

    @property
    def should_measure(self) -> bool:
        """An aggregation needs the gradients of every step."""
        return True

    @property
    def _gate(self) -> JointGradients:
        assert isinstance(self.reader, JointGradients)
        return self.reader

    def before_backward(self, loss: Tensor, batch: BatchState, step: OptimizerStepState) -> None:
        """Open the gate for a backward pass.

        Raises:
            ValueError: part of a task's gradient would miss the gate, or the tasks are back-propagated one by one.
        """
        super().before_backward(loss, batch, step)
        # The weights of a step's first evaluation apply to all of them: the optimizer expects a single function.
        self._keeps_weights = batch.is_repeated and self.rule.has_weights
        caller = self.setting.caller
        if not step.measured:
            return
        self._gate.begin(loss, stop=batch.reading_nodes())
        at_heads = [losses for task, losses in batch.losses.items() if task not in batch.read_at_losses]
        if {loss.node for losses in at_heads for loss in losses} & set(self._gate.other_paths):
            raise ValueError(
                f"{caller}: part of a task's gradient now reaches '{self.setting.representation}' by a path that does not "
                f"pass the task's head. Leave heads out: then each loss gets its own first-order pass."
            )
        waiting = [task for task in batch.losses if task not in batch.backpropagated]
        if self._gate.was_passed and waiting and self._gate.is_reached_from(loss):
            raise ValueError(
                f"{caller}: the loss of task '{waiting[0]}' has its own backward pass, but the gradients of all tasks "
                f"must reach the representation in one. Back-propagate the sum of the losses, or use at='parameters'."
            )
        if self._agrees_in_backward and not self._gate.is_reached_from(loss):
            # The other ranks wait at their gates for this rank's Gramian. Without a task in this batch it is zero.
            T = len(self.setting.tasks)
            self._agree(torch.zeros(T, T, dtype=self.rule.loss_weights.dtype), [False] * T)

    @property
    def _agrees_in_backward(self) -> bool:
        """Whether the ranks sum their Gramians in this backward pass, at the gate."""
        return self.setting.loop.ranks.size > 1 and self.rule.input != "matrix" and not self._keeps_weights

    def _agree(self, gramian: Tensor, present: Sequence[bool]) -> Tensor:
        """Return the weights λ for the Gramian of all ranks together."""
        table = torch.cat([gramian, torch.tensor(present, dtype=gramian.dtype)[:, None]], dim=1)
        table = self._weights.on_cpu.sum(table)
        self.gramian = table[:, :-1] / self.setting.loop.ranks.size**2
        return self._weights.of(self.gramian, table[:, -1] > 0)

    @torch.no_grad()
    def _combine(self, J: Tensor) -> Tensor:
        """Return the gradient that continues through the trunk in place of the rows of ``J``. Called within backward."""
        rule = self.rule
        here = torch.tensor([task in self._gate.read_tasks for task in self.setting.tasks])
        if self._keeps_weights:
            return self._weights.kept(here).to(J) @ J
        scale = self.setting.loop.pass_scale()
        gramian = (J @ J.T / scale**2).cpu()
        if rule.input != "matrix":
            return self._agree(gramian, here.tolist()).to(J) @ J
        self.gramian = gramian
        if rule.has_weights:
            return rule.weigh_gradients(gramian, here, J / scale).to(J) @ J
        return rule.aggregate(J / scale, here, self.setting.loop.ranks.index) * scale

    def close(self) -> None:
        """Destroy the process group."""
        self._weights.on_cpu.close()
