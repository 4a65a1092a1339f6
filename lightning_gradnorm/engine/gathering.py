"""Adds up, over the ranks, what one optimizer step has shown. After backward, never in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from lightning_gradnorm.engine.loss_scale import unit
from lightning_gradnorm.engine.step_state import Window
from lightning_gradnorm.gradients import RowReader


@dataclass(frozen=True)
class Gathered:
    """Means over the micro-batches and ranks of one optimizer step."""

    losses: Tensor
    """Of each task over those of its losses that were there, shape (T,)."""
    present: Tensor | None
    """Which tasks were there anywhere, bool of shape (T,); ``None`` if it is known that all were."""
    norms: Tensor | None
    """Of what was read of each task, shape (T,); ``None`` if nothing was."""


def gather(
    tasks: Sequence[str],
    window: Window,
    reader: RowReader | None,
    like: Tensor,
    trainer: L.Trainer,
) -> Gathered:
    """Return the step's mean losses and norms ``G_i``, in one fused sum over the ranks: T rows of gradient, loss and count.

    Args:
        tasks: the tasks' names.
        window: what the step has shown.
        reader: where the gradients are, if they were read.
        like: the weights in force, shape (T,).
        trainer: knows the ranks.
    """
    nothing = like.new_zeros(())
    losses = torch.stack([window.losses.get(task, nothing).to(like) for task in tasks])
    counts = [window.counts.get(task, 0) for task in tasks]
    if reader is not None:
        # As if the weight had not been rounded to the loss's precision.
        for task, applied in window.applied.items():
            reader.rescale(task, like[tasks.index(task)] / applied)
    if trainer.world_size == 1:
        norms = None if reader is None else reader.norms(tasks).to(like)
        if max(counts) > 1:
            losses = losses / _on(like, [max(count, 1) for count in counts])
        present = None if all(counts) else _on(like, counts) > 0
    else:
        table = torch.stack([losses, _on(like, counts)], dim=1)
        table = table if reader is None else torch.cat([table, reader.rows(tasks, like)], dim=1)
        table = trainer.strategy.reduce(table, reduce_op="sum")
        losses, present = table[:, 0] / table[:, 1].clamp(min=1), table[:, 1] > 0
        norms = None if reader is None else reader.norms_of(table[:, 2:])
    return Gathered(
        losses, present, norms if norms is None else norms / (unit(window.backwards, trainer) * trainer.world_size)
    )


def _on(like: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return the numbers on the device of ``like``, without waiting for it."""
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)
