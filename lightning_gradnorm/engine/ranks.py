"""What several ranks have to agree on before or within a backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gradnorm.engine.module_hooks import Undo


def mean_losses(
    tasks: Sequence[str], losses: Mapping[str, Sequence[Tensor]], like: Tensor, trainer: L.Trainer
) -> tuple[Tensor, Tensor]:
    """Return the mean over all ranks of each task's losses in this batch, and which tasks have one, each of shape (T,).

    One sum over the ranks of 2 T numbers, made before backward: all ranks have to come here together.
    """
    table = like.new_zeros(2, len(tasks))
    for place, task in enumerate(tasks):
        for loss in losses.get(task, ()):
            table[0, place] += loss.detach().reshape(()).to(like)
            table[1, place] += 1
    if trainer.world_size > 1:
        table = trainer.strategy.reduce(table, reduce_op="sum")
    return table[0] / table[1].clamp(min=1), table[1] > 0


class SideChannel:
    """Sums over the ranks in the midst of a backward pass, beside whatever DDP is reducing at that moment.

    Collectives of one process group have to be called in the same order on all ranks, which nobody can promise in backward,
    where a group's reductions begin as the gradients become ready. This is a group of its own, on the CPU, in which nothing
    else is ever called.

    Args:
        trainer: knows the ranks. With one rank there is nothing to agree on.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._group: dist.ProcessGroup | None = None
        if trainer.world_size > 1:
            timeout = getattr(trainer.strategy, "_timeout", None)  # the user's, if he gave DDPStrategy one
            self._group = dist.new_group(backend="gloo", timeout=timeout if isinstance(timeout, timedelta) else None)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor on the CPU over the ranks."""
        if self._group is not None:
            values = values.contiguous().clone()
            dist.all_reduce(values, group=self._group)
        return values

    def of_first_rank(self, values: Tensor) -> Tensor:
        """Return rank 0's tensor of this shape, on the CPU, on all ranks.

        What a solver makes of the same numbers may differ in the last bit from process to process, by where in memory they lie.
        """
        if self._group is not None:
            values = values.contiguous().clone()
            dist.broadcast(values, src=0, group=self._group)
        return values

    @property
    def close(self) -> Undo:
        """What gives the group back."""

        def give_back() -> None:
            group, self._group = self._group, None
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)

        return give_back


def of_first_rank(values: Tensor, trainer: L.Trainer) -> Tensor:
    """Return rank 0's tensor of this shape on all ranks, in the group in which the gradients are reduced."""
    if trainer.world_size > 1:
        values = values.contiguous()
        dist.broadcast(values, src=0)
    return values


def common_seed(trainer: L.Trainer) -> int:
    """Return rank 0's seed."""
    return int(trainer.strategy.broadcast(torch.initial_seed() % 2**62))
