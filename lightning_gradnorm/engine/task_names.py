"""The protocol of modules that declare their own tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class DeclaresTasks(Protocol):
    """A LightningModule that declares its tasks, as `MultiTaskModule` does, and calls `watch`."""

    @property
    def task_heads(self) -> Mapping[str, str]:
        """Task → dotted name of its head."""

    def task_losses(self, batch: Any) -> Mapping[str, Tensor]:
        """Return the losses of a batch, without a step."""
