"""Protects running statistics from counting a batch twice when reading a gradient recomputes an activation checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_NOTHING_CHANGES = nullcontext()


class BufferGuard:
    """Restores a model's buffers after gradients were read.

    A checkpointed region is recomputed whenever a gradient passes through it, which updates the running statistics of a
    BatchNorm inside. The first reading of each task finds the buffers that change; later readings copy only those. Most
    models have none, so the guard costs nothing after the first batch.

    Args:
        buffers: all buffers of the model.

    Example:
        >>> mean = torch.zeros(2)
        >>> guard = BufferGuard([mean])
        >>> with guard.preserved("seg"):
        ...     _ = mean.add_(1)
        >>> mean
        tensor([0., 0.])
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._all = list(buffers)
        self._changing: dict[int, Tensor] = {}
        self._read_before: set[str] = set()

    def preserved(self, *tasks: str) -> AbstractContextManager[None]:
        """Keep the buffers' values while the block reads these tasks' gradients."""
        is_first = not self._read_before.issuperset(tasks)
        return self._restored(tasks, is_first) if is_first or self._changing else _NOTHING_CHANGES

    @contextmanager
    def _restored(self, tasks: Iterable[str], is_first: bool) -> Iterator[None]:
        before = [(buffer, buffer.clone()) for buffer in (self._all if is_first else self._changing.values())]
        try:
            yield
        finally:
            self._read_before.update(tasks)
            for buffer, value in before:
                # Compare values, not `_version`: batch_norm writes its running statistics without increasing it. Write them
                # back through `.data` for the same reason: a BatchNorm whose backward is still to come has saved the buffer,
                # and a new version would make autograd refuse it.
                if not is_first or not torch.equal(buffer, value):
                    self._changing[id(buffer)] = buffer
                    buffer.data.copy_(value)
