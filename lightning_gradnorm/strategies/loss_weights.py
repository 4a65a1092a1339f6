"""Base of the scalarizers ``Σ_i w_i L_i`` whose weights depend on current and earlier losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_gradnorm.strategies.snapshot import LazyBufferModule


class LossWeights(LazyBufferModule):
    """Makes a scalarizer from `next_weights`; the weights are constants for the backward pass.

    They are computed in float32 at least. If a loss is not finite, all weights are equal, and that step is not remembered:
    the total shows it.
    """

    weights_sum_to: Literal["1", "T"] = "T"

    def __init__(self) -> None:
        super().__init__()
        self.tasks: tuple[str, ...] = ()

    def name_tasks(self, tasks: Sequence[str]) -> None:
        """Receive the tasks' names in the order of the losses, for error messages."""
        self.tasks = tuple(tasks)

    def forward(self, values: Tensor, /) -> Tensor:
        """Return the total loss of the tasks' losses, shape (T,), in float32 at least.

        Raises:
            ValueError: a loss is negative and must not be, or the number of losses has changed.
        """
        outside = torch.promote_types(values.dtype, torch.float32)
        inside = outside
        for buffer in self.buffers():
            inside = torch.promote_types(inside, buffer.dtype)
        losses = values.detach().to(inside, copy=True)
        is_finite = bool(losses.isfinite().all())
        weights = self.next_weights(losses) if is_finite else self.equal_weights(losses)
        return (weights.to(outside) * values).sum()

    def next_weights(self, losses: Tensor) -> Tensor:
        """Return the weights for finite losses, shape (T,), and remember what later steps need."""
        raise NotImplementedError

    def equal_weights(self, losses: Tensor) -> Tensor:
        """Return equal weights with the right sum, shape (T,)."""
        return torch.full_like(losses, 1.0 if self.weights_sum_to == "T" else 1 / len(losses))

    def recalled(self, name: str, like: Tensor) -> Tensor:
        """Return a buffer of T numbers, or of rows of T, in the losses' precision; zeros of ``like``'s shape in the first call.

        Raises:
            ValueError: it was made for another number of losses.
        """
        buffer = self.get_buffer(name)
        if buffer.numel() == 0:
            return torch.zeros_like(like)
        if buffer.shape != like.shape:
            raise ValueError(
                f"{type(self).__name__}: its state is of {buffer.shape[-1]} losses; got {like.shape[-1]}. "
                f"Call reset() before the tasks change."
            )
        return buffer.to(like)

    def refuse_negative(self, losses: Tensor, why: str) -> None:
        """Raise an error if a loss is negative.

        Raises:
            ValueError: a loss is negative; names its task.
        """
        if bool((losses < 0).any()):
            raise ValueError(
                f"{type(self).__name__}: no loss may be negative, since it {why}; got {losses.tolist()}"
                f"{f' for {list(self.tasks)}' if self.tasks else ''}. Use a loss that is bounded below by zero."
            )

    def reset(self) -> None:
        """Forget all earlier losses."""
        for name in list(self._buffers):
            buffer = self.get_buffer(name)
            setattr(self, name, torch.zeros_like(buffer) if buffer.ndim == 0 else buffer.new_empty(0))
