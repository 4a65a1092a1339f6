"""Weights that stay as they are: the baseline to compare with, and "GradNorm static" with a run's mean weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_gradnorm.callbacks.balancing import Balancing
from lightning_gradnorm.callbacks.task_names import check_positive_by_task


@dataclass(frozen=True)
class FixedRule:
    """Weights of which a checkpoint need not tell."""

    weights: Tensor

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


class FixedWeights(Balancing[FixedRule]):
    """Multiply each task's gradient by a number that does not change.

    Args:
        weights: task → weight ``w_i > 0``, used as given (they need not sum to T).
        tasks: where the losses are found, as for `GradNorm`; by default the names in ``weights`` (keys of what
            ``training_step`` returns, tasks of a `MultiTaskModule`).
        heads: taken as by every strategy, so that one can be exchanged for another; no gradient is read.

    Raises:
        ValueError: fewer than two tasks, a weight that is not positive and finite, or a task without a weight.

    Logs ``balancing/weight/<task>``.

    Example:
        >>> import lightning as L
        >>> from lightning_gradnorm import FixedWeights
        >>> trainer = L.Trainer(callbacks=[FixedWeights({"seg": 1.0, "depth": 0.2})], logger=False)
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        tasks: Sequence[str] | Mapping[str, str] | None = None,
        heads: Mapping[str, str] | None = None,
    ) -> None:
        if not (isinstance(weights, Mapping) and all(isinstance(task, str) for task in weights)):
            raise TypeError(f"FixedWeights: weights should be a mapping from task's name to number; got {weights!r}")
        super().__init__(list(weights) if tasks is None else tasks, heads=heads)
        check_positive_by_task(weights, self._names, asked_by=self._name, parameter="weights")
        self.weights: dict[str, float] = {task: float(weights[task]) for task in self._names}

    @override
    def _new_rule(self, like: Tensor) -> FixedRule:
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return FixedRule(torch.tensor(list(self.weights.values()), dtype=dtype, device=like.device))

    @override
    def _load(self, rule: FixedRule, state: Mapping[str, Any]) -> None:
        """There is nothing to take over: the weights are those that were given."""

    @override
    def _log(self, module: L.LightningModule) -> None:
        module.log_dict({f"balancing/weight/{task}": weight for task, weight in self.weights.items()}, on_step=True)
