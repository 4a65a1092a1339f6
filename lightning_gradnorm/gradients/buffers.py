"""Running statistics that are not to see a batch once more when a gradient is read through an activation checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class BufferGuard:
    """Puts back what a reading has changed in a model's buffers.

    A checkpointed region is computed again whenever a gradient passes it, and with it the running statistics of a
    BatchNorm. Which buffers change is seen when a task is read for the first time; the others, all of them in most models,
    cost nothing later.

    Args:
        buffers: all buffers of the model.

    Example:
        >>> mean = torch.zeros(2)
        >>> kept = BufferGuard([mean])
        >>> with kept.preserved("seg"):
        ...     _ = mean.add_(1)
        >>> mean
        tensor([0., 0.])
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._all = list(buffers)
        self._changing: dict[int, Tensor] = {}
        self._read_before: set[str] = set()

    @contextmanager
    def preserved(self, task: str) -> Iterator[None]:
        """Have all buffers afterwards as they were before."""
        is_first = task not in self._read_before
        before = [(buffer, buffer.clone()) for buffer in (self._all if is_first else self._changing.values())]
        try:
            yield
        finally:
            self._read_before.add(task)
            for buffer, value in before:
                # By its content: batch_norm writes its running statistics without a new `_version`. And without one they are
                # put back, since a BatchNorm whose backward is still to come has them in its graph.
                if not is_first or not torch.equal(buffer, value):
                    self._changing[id(buffer)] = buffer
                    buffer.data.copy_(value)
