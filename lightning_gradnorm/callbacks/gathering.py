"""Adds up, over the ranks, what one optimizer step has shown. After backward, never in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from lightning_gradnorm.callbacks.precision import unit
from lightning_gradnorm.callbacks.step import Window
from lightning_gradnorm.gradients import RowReader


@dataclass(frozen=True)
class Gathered:
    """Means over the micro-batches and ranks of one optimizer step."""

    losses: Tensor
    """Of each task over those of its losses that were there, shape (T,)."""
    present: Tensor
    """Which tasks were there anywhere, bool of shape (T,)."""
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
    counts = torch.tensor([float(window.counts.get(task, 0)) for task in tasks], dtype=like.dtype)
    counts = counts.to(like.device, non_blocking=True)
    if reader is not None:
        # As if the weight had not been rounded to the loss's precision.
        for task, applied in window.applied.items():
            reader.rescale(task, like[tasks.index(task)] / applied)
    norms = None
    if trainer.world_size > 1:
        table = torch.stack([losses, counts], dim=1)
        table = table if reader is None else torch.cat([table, reader.rows(tasks, like)], dim=1)
        table = trainer.strategy.reduce(table, reduce_op="sum")
        losses, counts = table[:, 0], table[:, 1]
        norms = None if reader is None else reader.norms_of(table[:, 2:])
    elif reader is not None:
        norms = reader.norms(tasks).to(like)
    if norms is not None:
        norms = norms / (unit(window.backwards, trainer) * trainer.world_size)
    return Gathered(losses / counts.clamp(min=1), counts > 0, norms)
