"""Running statistics that are not to see a batch once more when a gradient is read through an activation checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KeptBuffers:
    """Puts back what a reading has changed in a model's buffers.

    A checkpointed region is computed again whenever a gradient passes it, and with it the running statistics of a
    BatchNorm. Which buffers change is seen in the first pass; the others, all of them in most models, cost nothing later.

    Args:
        buffers: all buffers of the model.

    Example:
        >>> mean = torch.zeros(2)
        >>> kept = KeptBuffers([mean])
        >>> with kept.through_reading():
        ...     _ = mean.add_(1)
        >>> mean
        tensor([0., 0.])
    """

    def __init__(self, buffers: Iterable[Tensor]) -> None:
        self._watched = list(buffers)
        self._changing: dict[int, Tensor] = {}
        self._is_first_pass = True

    def end_pass(self) -> None:
        """Watch no others any more than those that have changed in the pass that ends here."""
        if self._is_first_pass:
            self._is_first_pass = False
            self._watched = list(self._changing.values())

    @contextmanager
    def through_reading(self) -> Iterator[None]:
        """Have all buffers afterwards as they were before."""
        before = [(buffer, buffer._version, buffer.clone()) for buffer in self._watched]
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, version, value in before:
                    if buffer._version != version:
                        self._changing[id(buffer)] = buffer
                        buffer.copy_(value)
