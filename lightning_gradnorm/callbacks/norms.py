"""Base of the callbacks whose weights come from the norms of the task gradients."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_gradnorm.callbacks.base import BalancingCallback
from lightning_gradnorm.engine.rule import NormRule

AnyNormRule = TypeVar("AnyNormRule", bound=NormRule)


class NormCallback(BalancingCallback[AnyNormRule]):
    """A callback whose weights are known before, during and after training."""

    _state_description = "its weights"

    @property
    def weights(self) -> dict[str, float]:
        """The current weights, by task."""
        return self._by_task("weights")

    @property
    def mean_weights(self) -> dict[str, float]:
        """Mean weights over the steps so far: the GradNorm paper trains "GradNorm static" with these."""
        return self._by_task("mean_weights")

    def _by_task(self, which: Literal["weights", "mean_weights"]) -> dict[str, float]:
        if (rule := self._trained._rule) is not None:
            return dict(zip(rule.tasks, getattr(rule, which).tolist(), strict=True))
        if self._restored is not None:
            key = "weights" if which == "weights" else "weights_mean"
            return dict(zip(self._restored["tasks"], self._restored[key].tolist(), strict=True))
        if not self._names:
            raise RuntimeError(
                f"{self._name}: the tasks of the MultiTaskModule are known only after training has started"
            )
        return dict(zip(self._names, self._build_rule(torch.zeros(())).weights.tolist(), strict=True))

    def _named(self, what: str, values: Tensor) -> dict[str, Tensor | float]:
        """Return one number per task, under ``what/<task>``."""
        return {f"{what}/{task}": value for task, value in zip(self._names, values, strict=True)}
