"""Sums and broadcasts over the ranks of a distributed training, and the means of one optimizer step from them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gradnorm.engine.step_state import OptimizerStepState, mean_of
from lightning_gradnorm.gradients import RowReader

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """The processes that train together. With one process, every method returns its argument."""

    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None
    """``None``: torch.distributed's default group."""

    @classmethod
    def current(cls) -> Ranks:
        """Return the ranks of the running process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_world_size(), dist.get_rank())
        return cls()

    def on_cpu(self, timeout: timedelta | None = None) -> Ranks:
        """Return the same ranks in a new gloo group, for sums in the middle of a backward pass; `close` it.

        Collectives of one group must be called in the same order on all ranks. In backward this is not guaranteed, because
        DDP's reductions start as gradients become ready. Nothing else is ever called in this group.
        """
        group = dist.new_group(backend="gloo", timeout=timeout) if self.size > 1 else None
        return Ranks(self.size, self.index, group)

    def close(self) -> None:
        """Destroy the group of `on_cpu`."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks."""
        if self.size > 1:
            values = values.contiguous().clone()
            dist.all_reduce(values, group=self.group)
        return values

    def broadcast_from_rank0(self, values: Tensor) -> Tensor:
        """Return rank 0's tensor, of the same shape on all ranks.

        A solver may give different last bits for the same numbers, depending on their alignment in memory.
        """
        if self.size > 1:
            values = values.contiguous().clone()
            dist.broadcast(values, src=0, group=self.group)
        return values

    def broadcast_object(self, value: Value) -> Value:
        """Return rank 0's value."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]

    def gather_objects(self, value: Value) -> list[Value]:
        """Return the values of all ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def require_agreement(self, caller: str, values: Mapping[str, str]) -> None:
        """Compare the values of all ranks.

        Raises:
            ValueError: the ranks disagree; raised on all ranks.
        """
        if self.size == 1:
            return
        of_all = self.gather_objects(dict(values))
        for what in values:
            for rank, other in enumerate(of_all):
                if other.get(what) != of_all[0].get(what):
                    raise ValueError(
                        f"{caller}: all ranks should have the same {what}; rank 0 has {of_all[0].get(what)}, rank {rank} has "
                        f"{other.get(what)}. Build the model and the rule in the same way on every rank."
                    )

    def warn(self, message: str) -> None:
        """Warn on rank 0."""
        if self.index == 0:
            warnings.warn(message, stacklevel=3)


def all_reduce_losses(
    tasks: Sequence[str], losses: Mapping[str, Sequence[Tensor]], like: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    """Return the mean over all ranks of each task's losses in this batch, and which tasks have one, each of shape (T,).

    This is one sum of 2 T numbers, before backward: all ranks must call it together.
    """
    table = like.new_zeros(2, len(tasks))
    for row, task in enumerate(tasks):
        for loss in losses.get(task, ()):
            table[0, row] += mean_of(loss).to(like)
            table[1, row] = 1
    table = ranks.sum(table)
    return table[0] / table[1].clamp(min=1), table[1] > 0


@dataclass(frozen=True)
class StepMeans:
    """Means over the micro-batches and ranks of one optimizer step."""

    losses: Tensor
    """Mean of each task's losses, shape (T,)."""
    present: Tensor | None
    """Which tasks were present on any rank, bool of shape (T,); ``None`` if all were."""
    norms: Tensor | None
    """``G_i``, shape (T,); ``None`` if the step was not measured."""


def reduce_step(
    tasks: Sequence[str],
    step: OptimizerStepState,
    reader: RowReader | None,
    like: Tensor,
    ranks: Ranks,
    scale: float | Tensor,
) -> StepMeans:
    """Return the step's mean losses and norms ``G_i``, from one fused sum over the ranks: T gradients, losses and counts.

    Args:
        tasks: the tasks' names.
        step: this rank's data of the step.
        reader: holds the gradients, if they were read.
        like: the current weights, shape (T,).
        ranks: the ranks to sum over.
        scale: ratio of this rank's gradients to those of its mean loss. Ranks may have different ones, for example because of
            different numbers of micro-batches.
    """
    losses = torch.stack([step.losses[task].to(like) if task in step.losses else like.new_zeros(()) for task in tasks])
    counts = [step.counts.get(task, 0) for task in tasks]
    if reader is not None:
        # As if the weight had not been rounded to the loss's precision.
        for task, rounded in step.rounded_weights.items():
            reader.rescale(task, like[tasks.index(task)] / rounded)
    if ranks.size == 1:
        norms = None if reader is None else reader.norms(tasks).to(like)
        if max(counts) > 1:
            losses = losses / _to_device(like, [max(count, 1) for count in counts])
        present = None if all(counts) else _to_device(like, counts) > 0
    else:
        scale = torch.as_tensor(scale).to(like)
        table = torch.stack([losses, _to_device(like, counts), scale.expand_as(losses)], dim=1)
        table = table if reader is None else torch.cat([table, reader.rows(tasks, like)], dim=1)
        table = ranks.sum(table)
        losses, present = table[:, 0] / table[:, 1].clamp(min=1), table[:, 1] > 0
        norms, scale = None if reader is None else reader.norms_of(table[:, 3:]), table[0, 2]
    # A tensor is not compared: the host would wait for its device.
    if norms is not None and (isinstance(scale, Tensor) or scale != 1.0):
        norms = norms / scale
    return StepMeans(losses, present, norms)


def _to_device(like: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return the numbers on the device of ``like``, without waiting for it."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)
